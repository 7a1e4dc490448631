"""One build: the graphs on their way through the passes, what is measured of them, gates, and the finished folder.

Imports `report`, `exporter.writing`, and what lies below them. Which pass is run with which options is decided
elsewhere: in the pipeline and by the search.
"""
