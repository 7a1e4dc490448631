"""A model traced, told apart into layers, and replicated: few layers are traced, whatever the depth; traces are cached.

Imports `exporter.aten`, `exporter.fusing`, `exporter.tracing`, `exporter.sources`, `graph` and `files`.
"""
