"""Measuring bundles against the tools that a user might pick instead, on the same questions, with the answers scored."""
