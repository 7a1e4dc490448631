"""The artifact: graphs on their way through a build, the folder that they become, and the files that describe it.

Imports `evaluation` and what lies below it; how an artifact is built is elsewhere (`building`).
"""
