"""One build: the graphs on their way through the passes, what is measured of them, gates, and the finished folder.

Imports the passes, `artifact`, `evaluation` and `report`; which pass is run with which options is decided elsewhere
(`onnxpress.pipeline`, `search`).
"""
