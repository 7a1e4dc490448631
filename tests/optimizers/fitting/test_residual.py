"""Where products join the stream: sums, sums of three, norms that add."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.calibration.calibration import Calibration
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.fitting.residual import Addition, addition_of
from onnxpress.optimizers.fusion.fuse_skip_norm import FuseSkipNorm
from onnxpress.optimizers.pruning.prune_ffn import PruneFfn

Exported = Callable[..., ir.Model]


def additions(model: ir.Model) -> list[tuple[Addition, Addition]]:
    """Of the first block's attention and feed-forward."""
    found = []
    for block in anatomy_of(model).blocks:
        output = block.attentions[0].output
        assert output is not None
        assert block.feed_forward is not None
        found.append((addition_of(block, output), addition_of(block, block.feed_forward.down)))
    return found


def test_one_after_the_other(exported: Exported) -> None:
    model = exported("llama")
    for block, (attention, network) in zip(anatomy_of(model).blocks, additions(model), strict=True):
        assert attention.terms == block.hidden
        assert network.terms == attention.stream
        assert network.stream[0].producer() in block.nodes
        assert attention.bias is network.bias is None


def test_parallel(exported: Exported) -> None:
    """Each has the other's output beside the stream."""
    model = exported("falcon")
    for block, (attention, network) in zip(anatomy_of(model).blocks, additions(model), strict=True):
        assert block.feed_forward is not None
        assert attention.terms == (block.feed_forward.down.output, *block.hidden)
        assert network.terms[1:] == block.hidden
        assert attention.stream == network.stream


def test_norms_that_add(exported: Exported) -> None:
    """BERT's bias goes into the norm with the sum; where nothing else reads that, its terms stand for it."""
    model = exported("bert")
    assert FuseSkipNorm()(model).modified
    for block, (attention, network) in zip(anatomy_of(model).blocks, additions(model), strict=True):
        assert block.feed_forward is not None
        assert attention.terms == block.hidden
        assert attention.bias is not None
        assert network.bias is not None
        assert network.stream == (block.feed_forward.down.output, *network.terms)


def test_a_norm_before_the_sum(exported: Exported) -> None:
    for attention, network in additions(exported("gemma2")):
        assert attention.terms == network.terms == ()
        assert len(attention.stream) == len(network.stream) == 1


@pytest.mark.parametrize("pooled", ["ReduceMean <keepdims = 0> (s, axes)", "Gather <axis = 1> (s, first)"])
def test_a_last_layer_that_is_pooled(graph: Callable[..., ir.Model], pooled: str) -> None:
    """What leaves the layer has a row a text, not a token: tokens are weighted by the sum all the same."""
    rng = np.random.default_rng(0)
    model = graph(
        f"""g (int64[batch_size, n] input_ids, int64[batch_size, n] attention_mask, float[60, 8] table,
            float[8, 16] m__layers__0__up, float[16, 8] m__layers__0__down, int64[1] axes, int64[1] first)
            => (y) {{
            x = Gather(table, input_ids)
            a = MatMul(x, m__layers__0__up)
            b = Tanh(a)
            d = MatMul(b, m__layers__0__down)
            s = Add(x, d)
            y = {pooled} }}""",
        table=rng.standard_normal((60, 8)).astype(np.float32),
        m__layers__0__up=rng.standard_normal((8, 16)).astype(np.float32),
        m__layers__0__down=rng.standard_normal((16, 8)).astype(np.float32),
        axes=np.array([1]),
        first=np.array([0]),
    )
    mask = np.ones((4, 20), np.int64)
    mask[0, 9:] = 0
    optimizer = PruneFfn(ratio=0.5, multiple_of=1)
    samples = [{"input_ids": rng.integers(0, 60, (4, 20)), "attention_mask": mask} for _ in range(4)]
    context = Context(Calibration(samples))
    assert optimizer.run(model, context).report.matched == {"feed-forward 16 -> 8": 1}
