"""Passes over ONNX graphs in drawers (fusion, heads, depth, pruning, quantization), and the recipes that order them.

Imports `graph`, `calibration` and what lies below them; never the exporter, the profiles or the driver.
"""
