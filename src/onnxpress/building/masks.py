"""Take the masks of an artifact's weights out of its graphs into a file of their own."""

from __future__ import annotations

from pathlib import Path

from onnxpress.artifact.folder import graph_paths
from onnxpress.errors import BadInputError, SourceNotFoundError
from onnxpress.files.layout import is_artifact
from onnxpress.graph.io import load_graph
from onnxpress.optimizers.pruning.mask_files import write_masks
from onnxpress.optimizers.pruning.masked_weights import extract_masks


def extract(model: str, output: Path) -> dict[str, int | float]:
    """Write the masks of all float products that have zeros; return how many there are, and their share of zeros.

    Args:
        model: an artifact folder, an ONNX file, or a folder with ONNX files.

    Raises SourceNotFoundError where there is no graph, BadInputError where no weight has zeros or two graphs disagree.
    """
    path = Path(model)
    if is_artifact(path):
        files = list(graph_paths(path).values())
    else:
        files = [path] if path.is_file() else sorted(path.rglob("*.onnx"))
    if not files:
        raise SourceNotFoundError(f"no ONNX graph at {model}", hint="give an artifact, an ONNX file or a folder")
    masks = extract_masks(load_graph(file) for file in files)
    if not masks:
        raise BadInputError(f"no float weight of {model} has zeros", hint="prune-weights makes some")
    write_masks(output, masks)
    size = sum(rows * columns for rows, columns in (mask.shape for mask in masks.values()))
    kept = sum(int(mask.rows(0, mask.shape[0]).sum()) for mask in masks.values())
    return {"masks": len(masks), "weights": size, "sparsity": 1 - kept / size, "bytes": output.stat().st_size}
