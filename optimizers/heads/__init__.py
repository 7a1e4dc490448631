"""The pass that gives attention fewer, or smaller, heads: which can be reduced, samples of them, the weights written.

Imports `optimizers.heads.maths`, which has the formulas, `optimizers`, `optimizers.fitting`, `calibration`, `graph` and
`graph.anatomy`.
"""
