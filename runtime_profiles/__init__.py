"""Profiles of what each target can do and likes: one TOML a target, and their loader.

Imports `runtime`, for the names of session options.
"""
