"""Labelling: rows or documents to people's decisions, as rows that ``train`` reads. HTTP and the page are in ``serve``."""
