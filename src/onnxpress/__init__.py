"""onnxpress: a transformer in, the smallest and fastest verified ONNX artifact out.

Importing this package imports nothing heavy: every command and every subpackage pulls in what it needs when it runs.
"""

from onnxpress._version import __version__

__all__ = ["__version__"]
