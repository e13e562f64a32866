"""Scores and prediction files for any predictor."""
