"""Olive as a contender: its mixed precision, its GPTQ, the genai builder behind them. usage:

    olive_quantize.py CHECKPOINT FOLDER TEXT

Writes onnxruntime-genai's files to FOLDER. Runs in its own environment with olive-ai. TEXT is what GPTQ looks at.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"

SAMPLES, LENGTH = 32, 256


def main() -> None:
    from olive import run

    checkpoint, folder, text = (Path(argument).resolve() for argument in sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch:
        lines = Path(scratch) / "text.json"
        lines.write_text(json.dumps({"text": text.read_text(encoding="utf-8")}) + "\n", encoding="utf-8")
        data = {
            "name": "calibration",
            "type": "HuggingfaceContainer",
            "load_dataset_config": {"data_name": "json", "data_files": str(lines), "split": "train"},
            "pre_process_data_config": {
                "strategy": "join",
                "add_special_tokens": False,
                "max_seq_len": LENGTH,
                "max_samples": SAMPLES,
            },
            "dataloader_config": {"batch_size": 1},
        }
        run(
            {
                "input_model": {"type": "HfModel", "model_path": str(checkpoint)},
                "systems": {
                    "local": {
                        "type": "LocalSystem",
                        "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
                    }
                },
                "data_configs": [data],
                "passes": {
                    "mixed": {"type": "SelectiveMixedPrecision", "algorithm": "k_quant_mixed"},
                    "gptq": {
                        "type": "Gptq",
                        "bits": 4,
                        "group_size": 32,
                        "sym": False,
                        "lm_head": True,
                        "data_config": "calibration",
                    },
                    "build": {"type": "ModelBuilder", "precision": "int4"},
                },
                "host": "local",
                "target": "local",
                "cache_dir": f"{scratch}/cache",
                "output_dir": f"{scratch}/out",
                "no_artifacts": True,
            }
        )
        graph = next(Path(scratch, "out").rglob("model.onnx"))
        shutil.copytree(graph.parent, folder, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
