"""The pass that leaves layers out, and what stands in for them.

Imports `optimizers`, `optimizers.fitting`, `calibration`, `graph` and `graph.anatomy`.
"""
