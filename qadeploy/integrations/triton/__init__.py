"""A Triton model repository of bundles, and a client of it."""
