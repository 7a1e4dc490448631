"""Parts of fitted passes: their loop, sums over tokens, regressions, where a product joins the residual stream.

Imports `optimizers`, `calibration`, `graph` and `graph.anatomy`.
"""
