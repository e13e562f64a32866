"""Other ways in: transformers' pipeline, Triton, graphs that answer by themselves."""
