"""Quantization as pure numpy: formats, grids, GPTQ, HQQ, least squares, ranges.

Imports numpy and `optimizers.fitting`: no graph.
"""
