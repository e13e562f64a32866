"""Answering with bundles on ONNX Runtime, without torch."""
