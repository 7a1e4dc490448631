"""Parts of fitted passes: their loop, sums over tokens, regressions, where a product joins the residual stream.

Imports `optimizers.base`, `graph` and `calibration`.
"""
