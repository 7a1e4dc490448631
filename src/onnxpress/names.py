"""Unknown names (passes, recipes, profiles, options) get an error that suggests the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from onnxpress.errors import UsageError


def unknown_name(kind: str, name: str, known: Iterable[str], *, see: str | None = None) -> UsageError:
    """A UsageError for `name`, its hint being the nearest of `known`, or the command `see` that lists them all."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]}?"
    elif see is not None:
        hint = f"see {see}"
    else:
        hint = "known: " + ", ".join(known) if known else "there are none"
    return UsageError(f"unknown {kind}: {name}", hint=hint)
