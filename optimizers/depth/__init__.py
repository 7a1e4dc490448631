"""The pass that leaves layers out, and what stands in for them.

Imports `optimizers.fitting`, `graph` and `calibration`; the formulas are in `maths`.
"""
