"""Calibration: the inputs that activations are looked at with, and a walk through a graph, one block at a time.

Imports `evaluation`, which reads and writes text, and what lies below it.
"""
