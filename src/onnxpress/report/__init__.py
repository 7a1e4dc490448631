"""Pages and tables for people: the inspection of a graph, drawings of its structure, the model card and the report.

Imports `artifact`, the passes and the profiles; prints nothing (that is `commands`).
"""
