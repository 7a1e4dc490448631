"""Chat templates of Hugging Face checkpoints, rendered in a sandbox: they are programs that come with a download.

Format: jinja2, with `messages`, `add_generation_prompt` and the special tokens as variables, `raise_exception` and
`strftime_now` as functions (https://huggingface.co/docs/transformers/chat_templating).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from onnxpress.errors import BadInputError
from onnxpress.files.json_files import read_optional_json

LONGEST = 1_000_000
"""Characters that a template may render; a loop over a huge range is an attack, not a prompt."""


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    """Plain JSON in the order given; jinja2's own filter sorts keys and escapes for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


def find_template(folder: Path) -> str | None:
    """The default chat template of a folder: `chat_template.jinja`, else that of tokenizer_config.json, else None."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = read_optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... of tokenizer_config.json as text."""
    result = {}
    for key, value in read_optional_json(folder / "tokenizer_config.json").items():
        if key.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                result[key] = content
    return result


def render(template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str], **variables: Any) -> str:
    """The prompt for `messages` (role, content), ending where the assistant's answer begins.

    Raises BadInputError where the template fails, refuses the messages, or tries to leave the sandbox.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals.pop("lipsum", None)
    environment.filters["tojson"] = _to_json
    try:
        pieces, length = [], 0
        compiled = environment.from_string(template)
        for piece in compiled.generate(
            {**tokens, "messages": list(messages), "add_generation_prompt": True, "tools": None, **variables}
        ):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST:
                raise BadInputError(f"the chat template renders more than {LONGEST} characters")
    except jinja2.TemplateError as error:
        raise BadInputError(f"the chat template fails: {error}", hint="leave the template out with --raw") from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        raise BadInputError(f"the chat template fails: {type(error).__name__}: {error}") from error
    return "".join(pieces)
