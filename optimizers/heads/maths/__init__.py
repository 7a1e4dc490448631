"""Attention heads as pure numpy: which to keep, keys and values merged, values and outputs refitted.

Imports numpy and `optimizers.fitting`: no graph.
"""
