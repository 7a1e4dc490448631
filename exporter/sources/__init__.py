"""Where checkpoints come from: folders, the hub, PyPI, GGUF, pickles, ONNX files; their weights as lazy tensors.

Imports `graph`, `artifact` and the catalog; torch for nothing but pickles.
"""
