"""Pruning as pure numpy: widths, ranks, masks, a rotation of the residual stream, budgets.

Imports numpy, `optimizers.fitting` and the solver of `optimizers.quantization.maths`: no graph.
"""
