"""The pass that gives attention fewer, or smaller, heads: which can be reduced, samples of them, the weights written.

Imports `optimizers.fitting`, `graph` and `calibration`; the formulas are in `maths`.
"""
