"""Texts to windows, logits to answers, answers to scores, with numpy and tokenizers alone."""
