"""Attention that exporters decompose into small operators, recognised part by part.

Imports `graph`, `graph.anatomy`, and `calibration` for evaluating small parts of a graph.
"""
