"""ONNX graphs: lazy tensors, reading and writing, checks, small questions and edits.

Imports `files`; knows nothing of passes, of sessions or of where a model comes from.
"""
