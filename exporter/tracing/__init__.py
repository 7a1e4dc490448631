"""A torch module to an ONNX graph: run without values, each operator written down, parameters bound lazily.

Imports `exporter.sources` and `graph`.
"""
