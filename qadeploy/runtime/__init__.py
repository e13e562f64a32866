"""Bundles to answers through ONNX Runtime: no torch, no transformers."""
