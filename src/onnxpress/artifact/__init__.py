"""The artifact: graphs on their way through a build, the folder that they become, and the files that describe it.

Imports `evaluation` and what lies below it. How an artifact is built is told elsewhere (`building`).
"""
