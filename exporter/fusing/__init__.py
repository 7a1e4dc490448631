"""Attention, rotations, norms and experts of transformers recognised while tracing, and written as fused operators.

Imports `exporter.tracing`.
"""
