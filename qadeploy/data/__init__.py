"""Readers, checks and splits: from files in many shapes to validated examples."""
