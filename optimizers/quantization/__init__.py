"""Passes that store weights or compute products in fewer bits, and what they share.

Imports `optimizers.quantization.maths`, which has the formulas, `optimizers.quantization.folding`, `optimizers`,
`optimizers.fitting`, `calibration` and `graph`.
"""
