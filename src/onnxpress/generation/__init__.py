"""Text from a model: chat templates, sampling, and what the command `run` shows.

Imports `evaluation` and what lies below it.
"""
