"""A drop-in for transformers' question-answering pipeline: ``from qadeploy.compat import pipeline``."""

from qadeploy.integrations.transformers_pipeline import QuestionAnsweringPipeline, SquadExample, pipeline

__all__ = ["QuestionAnsweringPipeline", "SquadExample", "pipeline"]
