"""Checkpoint or GGUF to graph: the only folder that imports torch or transformers."""
