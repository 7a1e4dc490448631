"""Writing a graph down while a torch module runs on tensors without values; its parameters are bound lazily.

Imports `exporter.sources` and `graph`.
"""
