"""The commands of `onnxpress`: their options, what each calls, and what is printed of it.

Imports the pipeline and what lies below it, inside the commands: `--help` loads click and nothing else.
"""
