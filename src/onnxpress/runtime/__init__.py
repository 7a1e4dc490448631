"""Models in onnxruntime: one way to open a session, one way to run each kind of graph.

Imports `graph`, for names that graphs are given; the benchmark measures a process that imports little more than this.
"""
