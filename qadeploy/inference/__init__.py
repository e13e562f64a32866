"""Bundles answered through ONNX Runtime, without torch."""
