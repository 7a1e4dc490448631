"""The catalog of known models: one TOML a model, and their loader.

Imports nothing but the errors.
"""
