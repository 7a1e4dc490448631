"""What fitted passes share: sums over tokens, regressions, and where a product joins the residual stream.

Imports `graph` and `calibration`.
"""
