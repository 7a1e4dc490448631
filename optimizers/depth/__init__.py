"""The pass that leaves layers out, and what stands in for them.

Imports `optimizers`, `calibration`, `graph` and `graph.anatomy`.
"""
