"""Graphs back to a checkpoint in the format of transformers.

Imports `exporter`, `exporter.layers`, `exporter.sources`, `graph` and `graph.anatomy`.
"""
