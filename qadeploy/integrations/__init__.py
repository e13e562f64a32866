"""Other ways to use a bundle: transformers' pipeline, Triton, graphs that answer by themselves."""
