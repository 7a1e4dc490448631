"""Pages and tables for people: the inspection of a graph, drawings of its structure, the model card and the report.

Imports `artifact`, `exporter` (architectures are tried), `optimizers`, `runtime_profiles`, and what lies below them;
prints nothing, which is left to the commands.
"""
