"""Pages, charts and model cards of runs and benchmarks, for people to read."""
