"""A model opened to be compared: what every kind of model can do, and the one loop that compares two of a kind.

A kind of model is a class: `Decoder`, `Encoder`, `EncoderDecoder`, `Graph`. It knows how to open a graph of its kind,
which inputs to compare on, in which modes to run them, and how outputs are told apart. Whoever compares two models
asks the class and never for the name of the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import onnxruntime

from onnxpress.arrays import Array, Ids
from onnxpress.errors import BadInputError
from onnxpress.progress import Update

Figures = dict[str, float]
PREFILL, DECODE, PADDED = "prefill", "decode", "padded"


@dataclass(frozen=True)
class GraphFile:
    """A graph in a file, loaded, before it is known of which kind it is."""

    path: Path
    folder: Path | None
    """Where tokenizer.json and config.json are, if anywhere."""
    config: Mapping[str, Any]
    genai: Mapping[str, Any]
    """What genai_config.json says of the model, where there is no config.json."""
    session: Callable[[], onnxruntime.InferenceSession]
    """Loads the graph; once."""
    session_options: Mapping[str, str] | None = None
    threads: int | None = None
    profile_prefix: str | None = None


@dataclass(frozen=True)
class Options:
    """The inputs that two models are compared on; see `onnxpress.evaluation.evaluate.evaluate`."""

    text: str | Path | Sequence[Ids] | None = None
    pairs: Path | None = None
    windows: int = 8
    window: int = 512
    decode_steps: int = 64
    seed: int = 0
    progress: Update | None = None

    @property
    def reads_text(self) -> bool:
        """Whether token ids are still to be made, of a file or of the built-in sentences."""
        return self.text is None or isinstance(self.text, str | Path)


@dataclass(frozen=True)
class Case:
    """Inputs to compare two models on."""

    inputs: Any
    """As the kind of model takes them."""
    modes: tuple[str, ...]
    """How the candidate runs them: a figure for each."""
    reference_mode: str = PREFILL
    """How the reference runs them, once for all modes."""
    own: Any = None
    """The same inputs as the candidate reads them, where its tokenizer is another one."""


Answered = tuple[Case, list[Any]]
"""A case, and what the reference computes for each of its inputs."""


class Difference(Protocol):
    """Sums over pairs of outputs, of one mode."""

    def compare(self, expected: Any, found: Any) -> None:
        """Add what the two models computed for one input. Raises VerificationError where `found` is not finite."""

    def figures(self) -> Figures: ...


D = TypeVar("D", bound=Difference)


@dataclass(frozen=True)
class Opened(ABC):
    """A model ready to run, with what belongs to it."""

    name: str
    model: Any
    """What runs it: a session of `onnxpress.runtime`, or anything with the same methods."""
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    """Where tokenizer.json and config.json are, if anywhere."""

    kind: ClassVar[str]
    """As artifacts and benchmarks call it."""
    writes_text: ClassVar[bool] = False
    embeds_text: ClassVar[bool] = False
    verified_by: ClassVar[type[Difference]]
    """What is measured of a pass."""
    judged_by: ClassVar[type[Difference]]
    """What is measured of an artifact."""

    parity_by: ClassVar[type[Difference]]
    """What is measured of an export beside the model that it came from."""

    @classmethod
    @abstractmethod
    def open(cls, file: GraphFile) -> Self | None:
        """Open a graph if it is of this kind."""

    @abstractmethod
    def verification_cases(
        self, like: Opened, windows: Sequence[Ids] | None, seed: int, length: int | None
    ) -> list[Case]:
        """Return the few inputs on which every pass is verified against this reference.

        like: a graph of the same model, which writes texts faster and knows the shapes of its inputs.
        windows: token ids [1, length] in place of what the reference would write.
        length: tokens in each, where the kind has a choice.
        """

    @abstractmethod
    def evaluation_cases(self, candidate: Any, options: Options) -> tuple[list[Case], str]:
        """Return the inputs on which a candidate is judged against this reference, and where they come from.

        Raises BadInputError where the two cannot be compared on what is asked for.
        """

    @abstractmethod
    def parity_cases(self, like: Opened, seed: int) -> list[Case]:
        """Return random inputs by which two implementations of one model are compared, number by number.

        like: a graph of the model, whose inputs tell their shapes.
        """

    @abstractmethod
    def run(self, mode: str, inputs: Any) -> list[Any]:
        """Run the inputs of a case in one mode; outputs are those that `Difference.compare` takes, for each input."""

    @abstractmethod
    def summary(self, modes: Mapping[str, Any]) -> Figures:
        """Return the figures of a verification, of the differences in each mode."""

    @abstractmethod
    def headline(self, modes: Mapping[str, Any], cases: Sequence[Case]) -> dict[str, Any]:
        """Return the fields of an `Evaluation` that the differences in each mode give."""

    @abstractmethod
    def recorded_inputs(self, seed: int) -> tuple[dict[str, Any], dict[str, Array]]:
        """Make inputs of one run, to be kept: plain numbers of tokens, arrays of anything else."""

    @abstractmethod
    def recorded_outputs(
        self, inputs: Mapping[str, Any], arrays: Mapping[str, Array], expected: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Run recorded inputs: (plain numbers, arrays), as small as a comparison allows.

        expected: plain numbers that were kept, which may say what of the outputs is wanted.
        """

    @abstractmethod
    def recorded_difference(self, expected: Mapping[str, Any], found: Mapping[str, Any]) -> Figures:
        """Compare outputs that were kept with those of now: `max_difference` or `cosine_min`."""

    @abstractmethod
    def speed(self, prompt: int, context: Sequence[int], repeats: int) -> tuple[Callable[[], object], dict[str, Any]]:
        """Time the model: (one run of it, the figures of a `Benchmark`)."""

    def runs(self, modes: Sequence[str], inputs: Any) -> Iterator[tuple[str, list[Any]]]:
        """`run` in one mode after the other."""
        for mode in modes:
            yield mode, self.run(mode, inputs)

    def answers(self, cases: Iterable[Case]) -> Iterator[Answered]:
        """Run cases as the reference; those that it cannot itself run in their modes are left out."""
        for case in cases:
            yield case, self.run(case.reference_mode, case.inputs)

    def seen_by(self, candidate: Opened, restricted: Self, options: Options) -> Self:
        """Choose what a candidate is compared with: this model, or the same `restricted` to the candidate's tokens."""
        return restricted

    def verified_windows(self) -> list[Ids] | None:
        """Return token ids [1, length] that a verification of a slower model may take for its own; None where inputs
        are as quickly made by that model."""
        return None

    def judged_windows(self, options: Options) -> tuple[list[Ids], str] | None:
        """Return token ids [1, length] that may be kept to judge many candidates on, and their origin; None where
        inputs are as quickly made anew."""
        return None

    def remembered(self, reopen: Callable[[], Any], folder: Path) -> Opened | None:
        """Return the same model with its answers kept in `folder`, if answering takes long: see `CachedDecoder`."""
        return None

    def chunk_case(self) -> Case:
        """Return a batch with several tokens at once after a past, for graphs that must agree to the last bits.

        Raises BadInputError for a model that writes no text.
        """
        raise self._writes_no_text()

    def begin(self, prompt: Ids) -> Ids:
        """Take in a prompt [1, length]; return what `model.prefill` is to be given to continue it.

        Raises BadInputError for a model that writes no text.
        """
        raise self._writes_no_text()

    def _writes_no_text(self) -> BadInputError:
        return BadInputError(f"{self.name} is an {self.kind}: it does not write text")

    def more_figures(
        self, candidate: Opened, reference: Opened, cases: Sequence[Case], modes: Any, options: Options
    ) -> dict[str, Any]:
        """Return fields of an `Evaluation` that take further runs or inputs.

        reference: this model as the candidate sees it, see `seen_by`.
        """
        return {}

    @property
    def starts(self) -> list[int]:
        """Token ids that text may begin with: `bos_token_id`, else `eos_token_id`, else 0."""
        text_config = self.config.get("text_config") or {}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = self.config.get(key, text_config.get(key))
            if value is not None:
                return list(value) if isinstance(value, list) else [int(value)]
        return [0]


def compare(
    candidate: Opened, answers: Iterable[Answered], make: Callable[[], D], tell: Callable[[], None] | None = None
) -> dict[str, D]:
    """Run a candidate on what a reference answered: by mode, the differences that `make` begins.

    tell: called after each case.
    """
    found: dict[str, D] = {}
    for case, expected in answers:
        for mode, outputs in candidate.runs(case.modes, case.inputs if case.own is None else case.own):
            difference = found.setdefault(mode, make())
            for one, other in zip(expected, outputs, strict=True):
                difference.compare(one, other)
        if tell is not None:
            tell()
    return found
