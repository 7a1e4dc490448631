"""Which layers are alike, a graph of a few traced layers, its replication to all layers, and a cache of what was traced.

Imports `exporter.fusing`, `exporter.tracing` and `exporter.sources`.
"""
