"""Passes that make a model thinner (widths, ranks, vocabulary), set weights to zero, and repair what is left.

Imports `optimizers.pruning.maths`, which has the formulas, `vocabulary`, `optimizers.fitting`, and what lies below
them.
"""
