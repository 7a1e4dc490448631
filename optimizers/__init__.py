"""Passes over ONNX graphs, one file a pass, and the recipes that order them."""
