"""Text to token windows, logits to spans, predictions to scores. Needs numpy and tokenizers only."""
