"""Past one machine: batch answering on Ray, Triton."""
