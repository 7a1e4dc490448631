"""Figures of quantization.py as Markdown tables: everything, the frontier, and ours against llama.cpp."""

from __future__ import annotations

import argparse
import re
from typing import Any

from common import Row, markdown

TITLES = {"decoder": "SmolLM2-135M-Instruct", "gpt": "A small GPT, never in 4 bits", "encoder": "all-MiniLM-L6-v2"}
DECODER_COLUMNS = ["change %", "KL", "top-1 %", "prefill 512 tok/s", "decode at 256 ms"]
ENCODER_COLUMNS = ["cosine mean", "cosine min", "Spearman", "latency ms"]
FORMATS = {"change %": "+.2f", "KL": ".2g", "cosine mean": ".4f", "cosine min": ".4f", "Spearman": ".2f"}
COST_COLUMNS = ["peak RSS MB", "build s", "build RSS MB"]
FLOAT32 = "onnxruntime fp32"


def loss(row: Row) -> float | None:
    """What the frontier is drawn by: KL divergence, or 1 - mean cosine."""
    if "KL" in row:
        return float(row["KL"])
    return 1 - float(row["cosine mean"]) if "cosine mean" in row else None


def frontier(rows: dict[str, Row]) -> set[str]:
    """Those that no other one equals or beats at both size and loss."""
    points = {
        name: (row["bytes"], value) for name, row in rows.items() if (value := loss(row)) is not None and "bytes" in row
    }
    return {
        name
        for name, point in points.items()
        if not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points.values())
    }


def everything(subject: str, rows: dict[str, Row]) -> list[Row]:
    full = rows.get(FLOAT32, {}).get("bytes")
    best = frontier(rows)
    columns = [*(ENCODER_COLUMNS if subject == "encoder" else DECODER_COLUMNS), *COST_COLUMNS]
    columns = [column for column in columns if any(column in row for row in rows.values())]
    result: list[Row] = []
    for name, row in sorted(rows.items(), key=lambda item: -item[1].get("bytes", 10**12)):
        if row.get("failed"):
            continue
        size = row.get("bytes")
        line: Row = {"contender": f"**{name}**" if row.get("family") == "onnxpress" else name}
        line["MB"] = size / 1e6 if size else None
        line["× fp32"] = f"{size / full:.3f}" if size and full else None
        for column in columns:
            value = row.get(column)
            line[column] = value if value is None else format(value, FORMATS[column]) if column in FORMATS else value
        result.append({**line, "frontier": "yes" if name in best else ""})
    return result


def against_llama_cpp(rows: dict[str, Row]) -> list[Row]:
    """Each of ours beside llama.cpp's best format (by KL) among those that are at most a tenth larger."""
    speeds = ("prefill 512 tok/s", "decode at 256 ms")
    ready = {name: row for name, row in rows.items() if all(key in row for key in ("bytes", "KL", *speeds))}
    result: list[Row] = []
    for name, row in ready.items():
        rivals = [
            (other["KL"], rival)
            for rival, other in ready.items()
            if other["family"] == "llama.cpp" and other["bytes"] <= 1.1 * row["bytes"]
        ]
        if row["family"] != "onnxpress" or not rivals:
            continue
        rival = min(rivals)[1]
        other = ready[rival]
        line: Row = {
            "comparison": f"{name} / {rival}",
            "size": row["bytes"] / other["bytes"],
            "KL": row["KL"] / other["KL"],
        }
        line["prefill, times as fast"] = row[speeds[0]] / other[speeds[0]]
        line["decode, times as fast"] = other[speeds[1]] / row[speeds[1]]
        line["RSS beyond 1.2 × bytes, MB"] = row["peak RSS MB"] - 1.2 * row["bytes"] / 1e6
        result.append(line)
    return result


def beaten(rows: dict[str, Row]) -> list[Row]:
    """Which contenders of others are at least as small and at least as close to the original as one of ours."""
    points = {
        name: (row["bytes"], value) for name, row in rows.items() if (value := loss(row)) is not None and "bytes" in row
    }
    result: list[Row] = []
    for name, (size, value) in points.items():
        if rows[name]["family"] == "onnxpress":
            better = [
                other
                for other, point in points.items()
                if rows[other]["family"] != "onnxpress" and point[0] <= size and point[1] <= value
            ]
            result.append({"ours": name, "equalled or beaten at both size and loss by": ", ".join(better) or "nobody"})
    return result


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """Markdown by subject."""
    result = {}
    for subject, rows in figures.get("subjects", {}).items():
        parts = [markdown(part) for part in (everything(subject, rows), beaten(rows), against_llama_cpp(rows)) if part]
        if failed := [f"{name}: {row['failed']}" for name, row in rows.items() if row.get("failed")]:
            parts.append("Not run: " + "; ".join(failed))
        result[TITLES[subject]] = "\n\n".join(parts)
    return result


def page_with(page: str, text: dict[str, str]) -> str:
    """`page` with each table between <!-- TITLE --> and <!-- end -->."""
    for title, table in text.items():
        pattern = rf"(<!-- {re.escape(title)} -->\n).*?(<!-- end -->)"
        page = re.sub(pattern, lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", page, flags=re.DOTALL)
    return page


def show(arguments: argparse.Namespace, name: str, text: dict[str, str]) -> None:
    """Print the tables, by title, write them to NAME.md of the output folder, and into the page, if one is given."""
    page = "\n\n".join(f"## {title}\n\n{table}" for title, table in text.items())
    (arguments.out / f"{name}.md").write_text(page + "\n", encoding="utf-8")
    print(page)
    if arguments.page:
        arguments.page.write_text(page_with(arguments.page.read_text(encoding="utf-8"), text), encoding="utf-8")
