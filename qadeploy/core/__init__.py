"""Texts to windows, logits to answers, answers to scores: numpy and tokenizers alone."""
