"""The command line: `onnxpress COMMAND …`. Commands are in `onnxpress.commands`; this is what they share.

Nothing but click is imported here or at the top of a command's module, so that `--help` and completion answer at once:
heavy imports live inside the commands (a test holds this).
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from onnxpress._version import __version__
from onnxpress.commands import look, make, measure
from onnxpress.commands.options import debug_option
from onnxpress.errors import OnnxpressError

INTERRUPTED = 130
TERMINATED = 143


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="onnxpress")
@debug_option
def cli() -> None:
    """A transformer in, the smallest and fastest verified ONNX artifact out.

    MODEL is a catalog name (onnxpress list models), a Hugging Face folder, hf:owner/name[@revision], a .gguf file, an
    ONNX file or a folder with one.
    """


for command in (*make.COMMANDS, *measure.COMMANDS, *look.COMMANDS):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `onnxpress.errors`); errors are one line on stderr."""
    state: dict[str, bool] = {"debug": False}
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        result = cli.main(arguments, prog_name="onnxpress", standalone_mode=False, obj=state)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        return _fail(error.format_message(), f"{context.command_path} --help" if context else None, error.exit_code)
    except OnnxpressError as error:
        _trace(state)
        return _fail(str(error), error.hint, error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _trace(state)
        return _fail("interrupted; nothing was written", None, INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone (`onnxpress list models | head`): not an error of ours, and stdout must not be flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        _trace(state)
        return _fail(f"this needs {error.name}, which is not installed", "pip install 'onnxpress[export]'", 1)
    except MemoryError:
        _trace(state)
        return _fail("not enough memory", "close other programs, or take a machine with more", 1)
    except Exception as error:  # a bug of ours or of a library: still one line
        _trace(state)
        hint = None if state["debug"] else "a bug: run again with --debug and report it"
        return _fail(f"{type(error).__name__}: {error}", hint, 1)
    finally:
        signal.signal(signal.SIGTERM, previous)


LONGEST = 1000
"""Characters of a message; libraries may put a whole graph into theirs."""


def _fail(message: str, hint: str | None, code: int) -> int:
    line = " ".join(message.split())
    if len(line) > LONGEST:
        line = f"{line[:LONGEST]} …"
    click.echo(f"error: {line}" + (f" (hint: {' '.join(hint.split())})" if hint else ""), err=True)
    return code


def _trace(state: dict[str, bool]) -> None:
    if state["debug"]:
        traceback.print_exc()


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like an exception, so that temporary files go away."""
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
