"""Graphs back to a checkpoint in the format of transformers.

Imports the rest of the exporter and `graph`.
"""
