"""The verbs train, export and quantize: the only room that may import torch, transformers, optimum."""
