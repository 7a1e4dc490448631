"""One build: the graphs on their way through the passes, what is measured of them, the gates, and the folder written.

Imports everything but the search, the pipeline and the command line.
"""
