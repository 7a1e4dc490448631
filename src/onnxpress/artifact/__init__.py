"""The artifact: what flows through a build, the folder that it becomes, and the files that describe it.

Imports `evaluation` and what lies below it; how an artifact is built is elsewhere (`build`).
"""
