"""Functions put in place of transformers' own for the time of one trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

IMPLEMENTATION = "onnxpress"
"""The name under which our attention, mask and experts functions are registered."""


@contextmanager
def registered(interface: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let models whose config asks for IMPLEMENTATION find `function` in one of transformers' interfaces."""
    interface.register(IMPLEMENTATION, function)
    try:
        yield
    finally:
        interface._global_mapping.pop(IMPLEMENTATION, None)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Override one module's forward; `vars` and not `setattr`, so that the class keeps its own."""
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
