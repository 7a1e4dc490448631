"""Who is compared: how each contender is built from one checkpoint, and which worker runs what came out.

Everything is built in the cache and stays there with what building it took. All contenders of a subject start from the
same weights in float32.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import common
from common import CACHE, PEERS, Measured, Worker

LLAMA_CPP = ["llama-cpp-python==0.3.36"]
GENAI = ["onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "numpy>=2"]
GENAI_BUILDER = [*GENAI, "torch==2.13.0", "transformers==5.23.0", "onnx-ir==1.1.0", "onnx==1.23.2", "tqdm"]
# Olive 0.13 patches the builder of its day, which 0.16 and later moved; datasets and requests it does not declare.
OLIVE = ["olive-ai==0.13.0", "torch==2.13.0", "transformers==5.23.0", "onnx==1.23.2", "onnxruntime==1.31.1"]
OLIVE += ["onnxruntime-genai==0.14.1", "datasets==5.2.0", "requests==2.34.2"]

GGUF_FORMATS = ("Q4_0", "Q4_1", "Q4_K_M", "Q5_K_M", "Q8_0")
ONNXRUNTIME_METHODS = {
    "quantize_dynamic u8": "dynamic-u8",
    "quantize_dynamic s8": "dynamic-s8",
    "quantize_static": "static",
    "MatMulNBits 8-bit": "nbits-8",
    "MatMulNBits 4-bit": "nbits-4",
    "MatMulNBits 4-bit symmetric": "nbits-4-symmetric",
    "MatMulNBits HQQ": "hqq",
    "MatMulNBits k-quant": "k-quant",
}
GENAI_OPTIONS = {
    "int8": ("int8",),
    "int4": ("int4",),
    "int4 rtn_last": ("int4", "algo_config=rtn_last"),
    "int4 k_quant_last": ("int4", "algo_config=k_quant_last"),
    "int4 k_quant_mixed": ("int4", "algo_config=k_quant_mixed"),
}


@dataclass(frozen=True)
class Subject:
    """What is compressed."""

    name: str
    model: str
    """As onnxpress takes it: a catalog name, a .gguf, a folder."""
    text: Path | None = None
    """What calibrating peers look at (decoders)."""
    calibration: Path | None = None
    """The same as token ids: a JSON list of lists."""
    sentences: Path | None = None
    """Pairs whose sentences an encoder's cosines are judged on; without, those that onnxpress brings along."""

    @property
    def folder(self) -> Path:
        return CACHE / "contenders" / common.slug(self.model)


@dataclass(frozen=True)
class Built:
    """A contender that is there."""

    path: Path
    """What its worker opens."""
    size_bytes: int
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Contender:
    """`build` fills an empty folder; `opens` is what the worker opens there, `ships` a pattern of what its size is."""

    family: str
    variant: str
    build: Callable[[Path], Measured]
    worker: Sequence[str]
    """A script of peers/ and its first arguments."""
    python: Callable[[], str] = field(default=lambda: sys.executable)
    opens: str = "."
    ships: str = "model.onnx*"
    key: str = ""
    """What else than the name decides what is built."""

    @property
    def name(self) -> str:
        return f"{self.family} {self.variant}"

    def built(self, subject: Subject, *, again: bool = False) -> Built:
        """Build it, unless it is there (and not wanted again). Raises RuntimeError with the tool's last words."""
        folder = subject.folder / f"{self.name.replace(' ', '-')}-{hashlib.sha256(self.key.encode()).hexdigest()[:8]}"
        record = folder / "built.json"
        if again or not record.exists():
            print(f"building {subject.name}: {self.name}", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            cost = self.build(folder)
            size = sum(path.stat().st_size for path in folder.glob(self.ships) if path.is_file())
            numbers = {"size_bytes": size, "seconds": cost.seconds, "peak_rss_bytes": cost.peak_rss_bytes}
            record.write_text(json.dumps(numbers), encoding="utf-8")
        return Built(path=folder / self.opens, **json.loads(record.read_text(encoding="utf-8")))

    def start(self, built: Built, threads: int) -> Worker:
        script, *arguments = self.worker
        command = [self.python(), PEERS / script, *arguments, built.path, str(threads)]
        return Worker(self.name, command, {"contender": self.name, "MB": built.size_bytes / 1e6})


def export(subject: Subject) -> Contender:
    """onnxpress's float32 graph, which onnxruntime's own tools start from."""

    def build(folder: Path) -> Measured:
        python = [sys.executable, PEERS / "export_onnxpress.py", subject.model, folder / "fp32"]
        return common.measured(python)

    return Contender("onnxruntime", "fp32", build, (), opens="fp32", ships="fp32/onnx/*")


def onnxruntime_tools(subject: Subject, worker: Sequence[str], methods: Mapping[str, str]) -> list[Contender]:
    """The float32 graph itself, and what onnxruntime's quantizers make of it."""
    base = export(subject)

    def build(folder: Path, method: str) -> Measured:
        start = base.built(subject)
        graph = next((start.path / "onnx").glob("*.onnx"))
        script = PEERS / "onnxruntime_quantize.py"
        cost = common.measured([sys.executable, script, graph, folder, method, str(subject.calibration)])
        peak = max(cost.peak_rss_bytes, start.peak_rss_bytes)
        return Measured(cost.seconds + start.seconds, peak, cost.output)

    return [
        Contender("onnxruntime", "fp32", base.build, worker, opens=base.opens, ships=base.ships),
        *(
            Contender("onnxruntime", name, partial(build, method=method), worker, opens="model.onnx")
            for name, method in methods.items()
        ),
    ]


def llama_cpp(subject: Subject, find_links: str | None, formats: Sequence[str] = GGUF_FORMATS) -> list[Contender]:
    """llama.cpp's quantizer on a float32 GGUF of the same weights."""
    python = partial(common.environment, "llama-cpp", LLAMA_CPP, find_links)

    def quantize(source: Path | str, folder: Path, name: str) -> Measured:
        return common.measured([python(), PEERS / "llama_cpp_quantize.py", source, folder / f"{name}.gguf", name])

    def full(folder: Path) -> Measured:
        if subject.model.endswith(".gguf"):
            return quantize(subject.model, folder, "F32")
        return common.measured([sys.executable, PEERS / "write_gguf.py", subject.model, folder / "F32.gguf"])

    base = Contender("llama.cpp", "F32", full, (), opens="F32.gguf", ships="*.gguf")

    def build(folder: Path, name: str) -> Measured:
        return quantize(base.built(subject).path, folder, name)

    worker = ("llama_cpp_worker.py",)
    return [
        Contender("llama.cpp", name, partial(build, name=name), worker, python, f"{name}.gguf", "*.gguf")
        for name in formats
    ]


def genai(subject: Subject, find_links: str | None, variants: Sequence[str] = tuple(GENAI_OPTIONS)) -> list[Contender]:
    """onnxruntime-genai's builder, run by onnxruntime-genai."""

    def build(folder: Path, precision: str, *options: str) -> Measured:
        python = common.environment("genai-builder", GENAI_BUILDER, find_links)
        checkpoint = common.checkpoint_folder(subject.model)
        command = [python, "-m", "onnxruntime_genai.models.builder", "-m", checkpoint, "-o", folder, "-p", precision]
        extra = ["--extra_options", *options] if options else []
        return common.measured([*command, "-e", "cpu", "-c", CACHE / "hub", *extra])

    def made(name: str) -> Callable[[Path], Measured]:
        return lambda folder: build(folder, *GENAI_OPTIONS[name])

    python = partial(common.environment, "genai", GENAI, find_links)
    return [Contender("onnxruntime-genai", name, made(name), ("genai_worker.py",), python) for name in variants]


def olive(subject: Subject, find_links: str | None) -> Contender:
    """Olive's GPTQ with its k-quant-like mix of 4 and 8 bits, run by onnxruntime-genai."""

    def build(folder: Path) -> Measured:
        python = common.environment("olive", OLIVE, find_links)
        checkpoint = common.checkpoint_folder(subject.model)
        return common.measured([python, PEERS / "olive_quantize.py", checkpoint, folder, str(subject.text)])

    python = partial(common.environment, "genai", GENAI, find_links)
    return Contender("Olive", "GPTQ, mixed", build, ("genai_worker.py",), python)


def onnxpress(subject: Subject, worker: Sequence[str], variants: Mapping[str, str]) -> list[Contender]:
    """`onnxpress build` with options by name."""

    def build(folder: Path, options: str) -> Measured:
        command = [sys.executable, "-m", "onnxpress.cli", "build", subject.model, "-o", folder / "artifact"]
        return common.measured([*command, *shlex.split(options)])

    return [
        Contender(
            "onnxpress",
            name,
            partial(build, options=options),
            worker,
            opens="artifact",
            ships="artifact/onnx/*",
            key=options,
        )
        for name, options in variants.items()
    ]


def artifact(name: str, folder: Path, worker: Sequence[str]) -> Contender:
    """An artifact that was built beforehand."""

    def build(target: Path) -> Measured:
        (target / "artifact").symlink_to(folder.resolve())
        return Measured(0.0, 0, "")

    key = f"{folder.resolve()} {folder.stat().st_mtime}"
    return Contender("onnxpress", name, build, worker, opens="artifact", ships="artifact/onnx/*", key=key)
