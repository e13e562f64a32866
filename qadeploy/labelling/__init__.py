"""Labelling: rows or documents in, decisions of people out, as rows that ``train`` reads. HTTP and the page are in ``serve``."""
