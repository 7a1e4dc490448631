"""Every error that onnxpress raises on purpose.

OnnxpressError                    1   something onnxpress understands went wrong
├── UsageError                    2   the request itself is wrong (option, pass, recipe or profile name)
├── BadInputError                 3   what was given cannot be used
│   ├── SourceNotFoundError           no such path, catalog name, revision, or no network to fetch it
│   ├── CorruptFileError              truncated, wrong checksum, wrong shape, NaN weights
│   ├── UnsafeInputError              pickle, remote code, external data outside its folder
│   └── UnsupportedModelError         an architecture, dtype or operator that onnxpress does not take
├── GateFailedError               4   the artifact works but misses a gate (--max-loss, --max-size, ...)
├── VerificationError             5   a graph does not compute what it should
│   ├── DestroyedError                a lossy pass left hardly anything of the model
│   └── NothingMatchedError           a pass found nothing to do and was not marked optional
└── OutputError                   6   the result could not be written (full disk, no permission)

The number is the exit code of the command line. Each error carries a one-line message and, where there is one, a hint:
what the user can do about it.

Not in the tree, because no caller ever meets them, are exceptions that mean "not this way" and are caught in their own
room, where another way is taken and the reason is noted:

    Refused        exporter.fusing                 an operator cannot be fused: it is traced as the model writes it
    CannotRecord   exporter.tracing                the model cannot be traced: torch's own exporter takes it
    CannotReplicate    exporter.layers                 layers cannot be copied from one another: each is traced
    NotFused       optimizers.fusion               a graph's attention is not what it looks like: it stays as it is
    Blocked        optimizers.quantization.folding  factors cannot pass a node: the channels are not rescaled
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class OnnxpressError(Exception):
    """Base of all errors above; `hint` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(OnnxpressError):
    exit_code = 2


class BadInputError(OnnxpressError):
    exit_code = 3


class SourceNotFoundError(BadInputError):
    pass


class CorruptFileError(BadInputError):
    pass


class UnsafeInputError(BadInputError):
    pass


class UnsupportedModelError(BadInputError):
    pass


class GateFailedError(OnnxpressError):
    exit_code = 4


class VerificationError(OnnxpressError):
    exit_code = 5


class DestroyedError(VerificationError):
    """A lossy pass left hardly anything of the model."""


class NothingMatchedError(VerificationError):
    pass


class OutputError(OnnxpressError):
    exit_code = 6


def unknown_name(
    kind: str, name: str, known: Iterable[str], *, see: str | None = None, explained: str | None = None
) -> UsageError:
    """Make a UsageError for `name`, its hint being the nearest of `known`, or the command `see` that lists them all.

    explained: a command that says what each of `known` means; the hint names it whatever else it says.
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {near[0]}?"
    elif see is not None:
        hint = f"see {see}"
    else:
        hint = "known: " + ", ".join(known) if known else "there are none"
    return UsageError(f"unknown {kind}: {name}", hint=hint if explained is None else f"{hint}; see {explained}")
