"""Structure cut by onnxsim. SOURCE TARGET CUT AMOUNT [CALIBRATION]; runs in onnxsim's own environment.

CUT heads, width: AMOUNT is the share that goes; with CALIBRATION (token ids, a JSON list of lists) by onnxsim's score
after Wanda, without it by l2 norms. CUT blocks: AMOUNT residual blocks (attentions or feed-forward networks) that turn
the hidden states least. CUT zeros, zeros-sparsegpt: AMOUNT of the weights become zero by Wanda or SparseGPT.
Fails where onnxsim leaves the graph as it is.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
from onnxsim import pruning


def feeds(model: onnx.ModelProto, windows: list[list[int]]) -> list[dict[str, np.ndarray]]:
    """A batch of one for each window, the cache being empty."""
    result = []
    for window in windows:
        ids = np.array([window], np.int64)
        feed = {}
        for value in model.graph.input:
            kind = value.type.tensor_type
            if value.name == "input_ids":
                feed[value.name] = ids
            elif value.name == "attention_mask":
                feed[value.name] = np.ones_like(ids)
            elif value.name == "position_ids":
                feed[value.name] = np.arange(len(window), dtype=np.int64)[None]
            elif value.name == "token_type_ids":
                feed[value.name] = np.zeros_like(ids)
            else:  # past_key_values: [batch, heads, past, head_dim]
                shape = [dim.dim_value for dim in kind.shape.dim]
                feed[value.name] = np.zeros((1, shape[1], 0, shape[3]), np.float32)
        result.append(feed)
    return result


def cut(model: onnx.ModelProto, what: str, amount: float, data: list[dict[str, np.ndarray]] | None) -> onnx.ModelProto:
    if what == "blocks":
        return pruning.apply_transformer_block_pruning(model, data, num_blocks_to_drop=int(amount))
    if what == "zeros":
        return pruning.apply_wanda_pruning(model, data, sparsity=amount)
    if what == "zeros-sparsegpt":
        return pruning.apply_sparsegpt_pruning(model, data, sparsity=amount)
    if what == "heads":
        if data is None:
            return pruning.apply_attention_head_pruning(model, amount)
        return pruning.apply_attention_head_wanda_pruning(model, data, sparsity=amount)
    if data is None:
        return pruning.apply_structured_pruning(model, amount)
    return pruning.apply_structured_wanda_pruning(model, data, sparsity=amount)


def without_unused(model: onnx.ModelProto) -> None:
    """Remove weights that nothing reads any more, which onnxsim leaves in the file."""
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def declare_cache(model: onnx.ModelProto) -> None:
    """Say in the graph's inputs and outputs how many heads its caches have by now, which onnxsim leaves as it was."""
    values = {value.name: value for value in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        heads = next((one.i for one in node.attribute if one.name == "kv_num_heads"), 0)
        for name in (*node.input[3:5], *node.output[1:3]) if heads else ():
            if name in values:
                values[name].type.tensor_type.shape.dim[1].dim_value = heads


def main() -> None:
    source, target, what, amount = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    model = onnx.load(source / "onnx" / "model.onnx")
    data = feeds(model, json.loads(Path(sys.argv[5]).read_text(encoding="utf-8"))) if len(sys.argv) > 5 else None
    result = cut(model, what, amount, data)
    without_unused(result)
    declare_cache(result)

    def sizes(model: onnx.ModelProto) -> dict[str, int]:
        return {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}

    if not what.startswith("zeros") and sum(sizes(result).values()) == sum(sizes(model).values()):
        raise SystemExit(f"onnxsim found nothing to cut: {what} {amount}")
    (target / "onnx").mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        if path.name != "artifact.json":
            shutil.copy(path, target)
    onnx.save(result, target / "onnx" / "model.onnx", save_as_external_data=True, location="model.onnx_data")


if __name__ == "__main__":
    main()
