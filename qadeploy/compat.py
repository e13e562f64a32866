"""The calls of transformers' question-answering pipeline, at a short address: ``from qadeploy.compat import pipeline``."""

from qadeploy.integrations.transformers_pipeline import QuestionAnsweringPipeline, SquadExample, pipeline

__all__ = ["QuestionAnsweringPipeline", "SquadExample", "pipeline"]
