"""Passes that store weights or compute products in fewer bits, and what they share.

Imports `optimizers.fitting`, `graph` and `calibration`; the formulas are in `maths`.
"""
