"""The catalog of known models: one TOML a model, and their loader.

Imports the errors alone.
"""
