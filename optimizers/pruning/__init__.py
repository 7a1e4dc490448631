"""Passes that make a model thinner (widths, ranks, vocabulary), set weights to zero, and repair what is left.

Imports `optimizers.fitting`, `graph` and `calibration`; the formulas are in `maths`.
"""
