"""Models in onnxruntime: one way to open a session, one way to run each kind of graph.

Imports the errors and the names of `graph`; the benchmark measures a process that imports little more than this.
"""
