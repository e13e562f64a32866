"""Measures bundles against other tools that a user might choose, on the same questions, and scores the answers."""
