"""Answers from a folder of documents: files to text, text to passages, an index of the passages, and answers with their place."""
