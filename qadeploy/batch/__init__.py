"""Batch inference: files of questions to files of answers, in this process or on Ray."""
