"""Profiles: what a target can do and likes. One TOML file per target in this folder; this is their schema and loader.

Passes read a profile's fields through `"auto"` options (see `onnxpress.optimizers.recipe`), never branch on its name.
To add a target: one TOML file.

    name = "cpu-x86-vnni"
    description = "x86-64 with AVX-512 VNNI or AVX-VNNI"
    opset = 21                              # the newest that the target's oldest client takes
    ir_version = 10
    dtypes = ["float32", "int8", "uint8"]   # that its kernels are fast with

    [host]                                  # when `cpu` picks this profile: architecture, and one set of flags complete
    architecture = ["x86_64", "amd64"]
    flags = [["avx512_vnni"], ["avx_vnni"]]
    priority = 20                           # the highest of those that fit wins

    [session_options]                       # checked: onnxruntime itself ignores typing errors
    "session.intra_op.allow_spinning" = "1"

    [recipes]                               # default recipe by task; `default` for the other tasks
    default = "cpu-encoder"
    text-generation = "cpu-decoder"

    [auto.quantize-dynamic]                 # by pass: the values that its options take when a recipe says "auto"
    weight_type = "int8"
"""

from __future__ import annotations

import platform
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from onnxpress.errors import UsageError, unknown_name

DETECT = "cpu"
"""The profile name that stands for the host's own."""


class Host(BaseModel):
    """The machines that a profile fits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: list[str]
    """`platform.machine()` in lower case."""
    flags: list[list[str]] = [[]]
    """CPU flags as /proc/cpuinfo names them: one inner list must be complete; `[[]]` fits every CPU."""
    priority: int = 0


class Profile(BaseModel):
    """One target. Unknown fields are refused, so that a typing error cannot pass for a setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    opset: int = Field(default=21, ge=11)
    ir_version: int = Field(default=10, ge=7)
    dtypes: list[str] = ["float32"]
    host: Host | None = None
    session_options: dict[str, str] = {}
    recipes: dict[str, str]
    auto: dict[str, dict[str, Any]] = {}

    @field_validator("session_options")
    @classmethod
    def _known_session_options(cls, options: dict[str, str]) -> dict[str, str]:
        from onnxpress.runtime.session_options import check_session_options

        check_session_options(options)
        return options

    @property
    def saturates(self) -> bool:
        """Say whether products of unsigned with signed bytes overflow: x86 without VNNI, unless an option helps."""
        if self.host is None or not {"x86_64", "amd64"}.intersection(self.host.architecture):
            return False
        vnni = all(any("vnni" in flag for flag in flags) for flags in self.host.flags)
        return not vnni and self.session_options.get("session.x64quantprecision") != "1"

    def recipe_for(self, task: str) -> str:
        """The default recipe for one of optimum's task names; `text-generation-with-past` counts as its base task."""
        for name in (task, task.removesuffix("-with-past"), "default"):
            if name in self.recipes:
                return self.recipes[name]
        raise UsageError(f"profile {self.name} has no default recipe for {task}", hint="choose one with --recipe")


def profile_names() -> list[str]:
    """Every profile that can be asked for, the detecting `cpu` first."""
    return [DETECT, *sorted(_files())]


def load_profile(name: str) -> Profile:
    """The profile of that name (`cpu` detects the host's own), or of a TOML file of one's own.

    Raises UsageError for an unknown name or a file that does not follow the schema.
    """
    if name == DETECT:
        return detect_profile()
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return _parse(path.name, path.read_text(encoding="utf-8"))
    files = _files()
    if name not in files:
        raise unknown_name("profile", name, profile_names(), see="onnxpress list profiles")
    return _parse(f"{name}.toml", files[name])


def detect_profile(machine: str | None = None, flags: frozenset[str] | None = None) -> Profile:
    """The profile with the highest priority among those whose `host` fits this machine (or the one described)."""
    machine = (machine or platform.machine()).lower()
    if flags is None:
        flags = cpu_flags()
    fitting = [
        (profile.host.priority, profile.name, profile)
        for profile in map(load_profile, sorted(_files()))
        if profile.host is not None
        and machine in profile.host.architecture
        and any(flags.issuperset(wanted) for wanted in profile.host.flags)
    ]
    if not fitting:
        raise UsageError(f"no CPU profile fits this machine ({machine})", hint="name one: onnxpress list profiles")
    return max(fitting)[2]


@cache
def cpu_flags() -> frozenset[str]:
    """The feature flags of the first CPU in /proc/cpuinfo (`flags` on x86, `Features` on ARM); empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


@cache
def _files() -> dict[str, str]:
    """TOML text by profile name."""
    folder = resources.files("onnxpress.runtime_profiles")
    return {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    }


def _parse(label: str, text: str) -> Profile:
    try:
        return Profile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{label}: not TOML: {error}", hint="correct the file there") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        hint = "docs/guide/recipes-and-profiles.md says what a profile holds"
        raise UsageError(f"{label}: {where}: {first['msg']}", hint=hint) from error
