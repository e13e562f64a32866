"""Scores and prediction files of any predictor."""
