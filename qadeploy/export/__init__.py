"""A run folder to ONNX bundles, with proof at every step."""
