"""Which function translates which ATen operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

TRANSLATIONS: dict[str, Callable[..., Any]] = {}
"""By `name` (all overloads) or `name.overload`. An operator that writes into its first argument (`add_`) goes by the
name of the one that does not."""

Translation = TypeVar("Translation", bound=Callable[..., Any])


def aten(*names: str) -> Callable[[Translation], Translation]:
    """Register a translation of the named operators."""

    def register(function: Translation) -> Translation:
        TRANSLATIONS.update(dict.fromkeys(names, function))
        return function

    return register
