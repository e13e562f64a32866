"""Measuring a bundle against what a user would pick instead, on the same questions, answers scored."""
