"""Fine-tuning: examples to a run folder."""
