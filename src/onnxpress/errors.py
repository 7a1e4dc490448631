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
│   └── NothingMatchedError           a pass found nothing to do and was not marked optional
└── OutputError                   6   the result could not be written (full disk, no permission)

The number is the exit code of the command line. Each error carries a one-line message and, where there is one, a hint:
what the user can do about it.
"""

from __future__ import annotations


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
