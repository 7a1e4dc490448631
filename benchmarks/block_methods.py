"""4-bit blocks by every method of quantize-blocks, with and without `awq` before it: what each loses.

    python benchmarks/block_methods.py     SmolLM2-135M, its weights moved off their 4-bit grid
    python benchmarks/block_methods.py --model all-minilm-l6-v2 --calibration FILE --text FILE

Everything but the products stays in float32, so that nothing else blurs the comparison. Unless said
otherwise, decoders are calibrated and judged on text that they write, with different seeds, and encoders on the same
built-in sentences: give them texts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from common import CACHE, MODEL, PEERS, Row

METHODS = ("nearest", "least-squares", "importance", "gptq")
AWQ_METHODS = ("nearest", "least-squares", "gptq")
Passes = Sequence[tuple[str, dict[str, Any]]]


def apply(source: Path, target: Path, passes: Passes, samples: Sequence[str], text: str | None) -> float:
    """CPU seconds that the passes took; `samples` are rows and tokens in each."""
    script = [sys.executable, PEERS / "apply_passes.py"]
    command = [*script, source, target, *samples, json.dumps(passes), *([text] if text else [])]
    output = common.measured(command).output
    return float(json.loads(output.splitlines()[-1])["cpu_s"])


def judge(candidate: Path, reference: Path, data: Sequence[str]) -> Row:
    command = [sys.executable, "-m", "onnxpress.cli", "evaluate", candidate, "--reference", reference, "--json", *data]
    output = common.measured(command).output
    found = json.loads(output[output.index("{") :])
    if found["kind"] == "decoder":
        growth = found["perplexity"] / found["reference_perplexity"] - 1
        return {"perplexity": f"{growth:+.1%}", "KL": found["modes"]["prefill"]["kl"], "top-1": found["top1_agreement"]}
    row = {"1 - cosine": f"{1 - found['cosine_mean']:.5f}", "1 - cosine, worst": f"{1 - found['cosine_min']:.5f}"}
    if "spearman" in found:
        row["Spearman"] = f"{100 * (found['spearman'] - found['reference_spearman']):+.2f}"
    return row


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--blocks", type=int, nargs="+", default=(32, 64))
    parser.add_argument("--samples", type=int, default=32, help="rows of text to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--calibration", metavar="TEXT", help="what to calibrate on")
    parser.add_argument("--text", help="what to judge on")
    parser.add_argument("--pairs", help="scored sentence pairs, for encoders")
    arguments = parser.parse_args()
    data = [
        word
        for name in ("text", "pairs")
        if getattr(arguments, name)
        for word in (f"--{name}", getattr(arguments, name))
    ]
    work = CACHE / "block-methods" / common.slug(arguments.model)
    plain, base = work / "fp32", work / "reference"
    if not plain.exists():
        build = [sys.executable, "-m", "onnxpress.cli", "build", arguments.model, "-r", "fp32", "-o", plain]
        common.measured(build)
    samples, text = (str(arguments.samples), str(arguments.length)), arguments.calibration
    apply(plain, base, [("perturb", {})] if arguments.model == MODEL else [], samples, text)
    tables: dict[str, list[Row]] = {}
    for size in arguments.blocks:
        format = {"bits": 4, "block_size": size}
        rows = tables.setdefault(f"4 bits, symmetric blocks of {size}", [])
        for scaled, methods in ((False, METHODS), (True, AWQ_METHODS)):
            names = {method: f"awq, {method}" if scaled else method for method in methods}
            wanted = [method for method, name in names.items() if common.wanted(name, arguments.only)]
            source = base
            search = 0.0
            if scaled and wanted:
                source = work / "awq"
                search = apply(base, source, [("awq", format)], samples, text)
            for method in wanted:
                options = format | {"method": method, "accuracy_level": 0}
                seconds = apply(source, work / "candidate", [("quantize-blocks", options)], samples, text)
                rows.append(
                    {"method": names[method], **judge(work / "candidate", base, data), "CPU s": search + seconds}
                )
                print(rows[-1], file=sys.stderr)
    common.report("Methods of quantize-blocks", tables, arguments)


if __name__ == "__main__":
    main()
