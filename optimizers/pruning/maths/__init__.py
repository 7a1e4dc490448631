"""Pruning as pure numpy: widths, ranks, masks, a rotation of the residual stream, budgets.

Imports numpy, `optimizers.fitting` and `optimizers.quantization.maths`, whose solver it shares: no graph.
"""
