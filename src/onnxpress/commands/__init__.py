"""The commands of `onnxpress`: their options, what each calls, and what is printed of it.

Imports `pipeline`, `api`, and what lies below them, inside the commands: `--help` loads click and nothing else.
"""
