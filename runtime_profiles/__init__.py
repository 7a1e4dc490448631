"""Profiles of what each target can do and likes: one TOML a target, and their loader.

Imports the errors and the session options of `runtime`.
"""
