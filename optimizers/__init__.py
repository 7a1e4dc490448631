"""Passes over ONNX graphs in drawers (fusion, heads, depth, pruning, quantization), and the recipes that order them.

Imports `artifact`, `calibration` and `graph`; never the exporter, the profiles or the driver.
"""
