"""Attention heads: what the model loses without each of them.

A head taken out is a format of the product that reads what all heads computed: its columns are zero, as if its rows of
the output product were gone. Nothing makes up for it, unlike in `reduce-heads`, which refits the other rows: what is
measured is how much the model relies on the head, of which the refit can save a part. It needs no fitting and no
samples to fit to, and works for attention that `reduce-heads` refuses, such as cross-attention.

Where query heads share keys and values, it is the query heads that are taken out, one at a time: heads h · group to
(h + 1) · group − 1 share key/value head h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Attention, anatomy_of
from onnxpress.graph.io import copy_graph
from onnxpress.search.formats import Format
from onnxpress.search.groups import Part


@dataclass(frozen=True)
class AttentionOutput:
    """The output product of an attention, by the values between which it lies."""

    name: str
    """`model.layers.3.self_attn.o_proj`"""
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    """What the heads computed, side by side, [batch, tokens, heads · head_dim]."""
    outputs: tuple[str, ...]
    shape: tuple[int, int]
    """(heads · head_dim, out)"""
    heads: int

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class WithoutHead(Format):
    """A format of an attention's output product: as it is without one head."""

    head: int
    losses_follow: ClassVar[bool] = False

    @classmethod
    def of(cls, head: int) -> WithoutHead:
        """Make the format without this head, named after it."""
        return cls(f"head {head}", (), head)

    @property
    def key(self) -> str:
        return f"without head {self.head}"

    def apply(self, part: ir.Model, of: Part, calibration: Calibration) -> ir.Model | None:
        """None where there is no such head."""
        assert isinstance(of, AttentionOutput)
        if self.head >= of.heads:
            return None
        model = copy_graph(part)
        (states,) = model.graph.inputs
        kept = np.ones((of.heads, of.shape[0] // of.heads), np.float32)
        kept[self.head] = 0.0
        mask = ir.Value(name=f"{states.name}/kept", const_value=ir.tensor(kept.reshape(-1)))
        model.graph.register_initializer(mask)
        masked = ir.node("Mul", [states, mask])
        ir.convenience.replace_all_uses_with(states, masked.outputs[0])
        masked.replace_input_with(0, states)
        model.graph.insert_before(next(iter(model.graph)), masked)
        return model


def find_attention_outputs(model: ir.Model) -> list[AttentionOutput]:
    """Find those of all attentions whose number of heads is told. Raises UnsupportedModelError where there are none."""
    attentions = [attention for block in anatomy_of(model).blocks for attention in block.attentions]
    found = [one for attention in attentions if (one := _output_of(attention)) is not None]
    if not found:
        raise UnsupportedModelError(
            "no attention tells how many heads it has", hint="fuse a foreign graph first: --pass fuse-foreign"
        )
    return found


def without_heads(outputs: Sequence[AttentionOutput]) -> list[WithoutHead]:
    """Make a format for each head that any of them has."""
    return [WithoutHead.of(head) for head in range(max((one.heads for one in outputs), default=0))]


def _output_of(attention: Attention) -> AttentionOutput | None:
    product, heads = attention.output, attention.heads
    if product is None or not heads or product.features[0] % heads:
        return None
    return AttentionOutput(
        product.name.removesuffix(".weight"),
        (product.name,),
        (str(product.activation.name),),
        (str(product.output.name),),
        product.features,
        heads,
    )
