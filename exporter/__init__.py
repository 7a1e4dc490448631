"""Checkpoint or GGUF to graph: the only folder that imports torch or transformers.

A module for each family of models (decoder, encoder, encoder-decoder) and what is common to them stands here; the rooms
below read sources, write graphs down, fuse, and replicate layers.
Imports `exporter.layers`, `artifact`, and what lies below them.
"""
