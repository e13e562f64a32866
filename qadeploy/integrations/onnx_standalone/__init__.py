"""Bundles whose graph answers by itself, for other languages."""
