"""Passes that say the same in fewer operators: cleaned up, fused, packed; graphs of others in the form of ours.

Imports `graph`, and `calibration` for evaluating small parts of a graph.
"""
