"""Scores and prediction files for any answerer."""
