"""Passes that say the same in fewer operators: cleaned up, fused, packed; graphs of others in the form of ours.

Imports `optimizers`, `optimizers.fusion.decomposed`, `optimizers.quantization` (weights that lie on a grid stay as they
are), `graph` and `graph.anatomy`.
"""
