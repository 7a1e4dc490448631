"""trim-vocabulary: the rows of an embedding, and the logits, of the tokens that a text, a language or a size needs.

    logits = x · E[kept]ᵀ,  embedding = E[kept][ids]

Which tokens these are, what the tokenizer makes of text without the others, and the files that follow, are the driver's
to know (`onnxpress.vocabulary`): it sets `kept` before the pass runs. For these tokens the graph computes what it did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Ids
from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.graph.anatomy import Anatomy, Product, anatomy_of
from onnxpress.graph.anatomy.editing import keep_weight, require_editable, select_part
from onnxpress.graph.anatomy.map import Embedding
from onnxpress.graph.edits import add_constant
from onnxpress.graph.linear import match_linear
from onnxpress.graph.matching import scalar
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import concrete_shape
from onnxpress.optimizers.base import Pass

_INPUTS = ("input_ids", "decoder_input_ids")
_RESHAPED = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Concat", "Expand")
"""What hands on token ids as they are."""
_COMPARED = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
_ORDERED = ("ArgMax", "ArgMin", "Shape", "Size")
"""What asks for the order of ids at most, which stays."""
_POINTWISE = ("Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity", "Clip", "Softmax", "LogSoftmax")
"""What may stand between the head and the output."""
_HINT = "put trim-vocabulary before quantizing passes"


class TrimVocabulary(Pass):
    """Keep some tokens of a model: rows of its embedding, columns of its head, tied or not; `vocab_size` shrinks.

    Tokens are numbered anew, in their old order. Tokenizer and configs follow; text of kept tokens is read as before.
    Changes the signature: the last dimension of `logits`.
    """

    name = "trim-vocabulary"
    needs_anatomy = True
    exact = True  # for the tokens that are kept, beside the original's softmax over these

    def __init__(
        self,
        corpus: str | None = None,
        scripts: Sequence[str] | None = None,
        tokens: int | None = None,
        multiple_of: int = 1,
    ) -> None:
        """
        Args:
            corpus: a text (or what else calibration takes) whose tokens are kept, so that it is tokenized as before.
            scripts: keep whatever text in these leads to: `latin`, `greek`, `cjk`, … with digits and punctuation; or
                `ascii`.
            tokens: how many to keep: the corpus's most frequent first, then those that were learned first.
            multiple_of: keep a few more, for a vocabulary of this many times a whole number.
        """
        super().__init__()
        if corpus is None and scripts is None and tokens is None:
            raise ValueError("give a corpus, scripts or a number of tokens")
        if scripts is not None and not scripts:
            raise ValueError("scripts is an empty list")
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens must be 1 or more, not {tokens}")
        if multiple_of < 1:
            raise ValueError(f"multiple_of must be 1 or more, not {multiple_of}")
        self.corpus, self.scripts = corpus, tuple(scripts) if scripts is not None else None
        self.tokens, self.multiple_of = tokens, multiple_of
        self.kept: Ids | None = None
        """Ids of the tokens to keep, ascending: int64 [kept]. Set by the driver."""

    def apply(self, model: ir.Model, report: Report) -> None:
        if self.kept is None:
            raise UsageError("trim-vocabulary runs in a build only, where there is a tokenizer")
        kept, anatomy = self.kept, anatomy_of(model)
        tables = [table for table in anatomy.embeddings if _reads_ids(table.node.inputs[1])]
        if not tables:
            return report.skip("no table is looked up by input_ids")
        rows = _rows_of(tables)
        if kept[-1] >= rows:
            raise UnsupportedModelError(f"the embedding has {rows} rows; token {int(kept[-1])} has none")
        if len(kept) == rows:
            return report.skip("all tokens are kept")
        head = _head(model, anatomy, tables, rows)
        _renumber_comparisons(model.graph, {table.node for table in tables}, kept)
        for weight in dict.fromkeys(table.weight for table in tables):
            _keep_rows(weight, kept)
            report.match("embedding")
        if head is not None:
            if not any(table.weight is head.weight for table in tables):
                keep_weight(head, None, kept)
            _trim_logits(model.graph, head, rows, kept)
            report.match("head")


def _reads_ids(value: ir.Value | None) -> bool:
    while value is not None and not value.is_graph_input():
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _RESHAPED else None
    return value is not None and value.name in _INPUTS


def _rows_of(tables: Sequence[Embedding]) -> int:
    """Rows of the tables, which are float, of one size, and read by lookups and the head alone."""
    sizes = set()
    for table in tables:
        tensor = table.weight.const_value
        if table.node.op_type != "Gather" or tensor is None or not tensor.dtype.is_floating_point():
            raise UnsupportedModelError(f"{table.weight.name} is not in floating point any more", hint=_HINT)
        if table.weight.is_graph_output() or table.weight.is_graph_input():
            raise UnsupportedModelError(f"{table.weight.name} is an input or output of the graph")
        sizes.add(concrete_shape(tensor)[0])
    if len(sizes) > 1:
        raise UnsupportedModelError(f"tables of {', '.join(map(str, sorted(sizes)))} rows are looked up by input_ids")
    return sizes.pop()


def _head(model: ir.Model, anatomy: Anatomy, tables: Sequence[Embedding], rows: int) -> Product | None:
    """The product that makes a logit for each row, None where the outputs are no words."""
    readers = {table.node for table in tables}
    head = anatomy.head if anatomy.head is not None and anatomy.head.features[1] == rows else None
    if head is not None:
        tied = any(table.weight is head.weight for table in tables)
        if match_linear(head.node) is None:
            raise UnsupportedModelError(f"{head.name} is not in floating point any more", hint=_HINT)
        if not tied:
            require_editable(head)
        readers.add(head.node)
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    if head is None and logits is not None and logits.shape is not None and logits.shape[-1] == rows:
        raise UnsupportedModelError("no product with a constant matrix makes the logits", hint=_HINT)
    for weight in {table.weight for table in tables}:
        pending = [weight]
        while pending:
            for user, _ in pending.pop().uses():
                if user.op_type in ("Transpose", "Cast"):
                    pending += user.outputs
                elif user not in readers:
                    raise UnsupportedModelError(f"{weight.name} is also read by {user.op_type} {user.name}")
    return head


def _keep_rows(weight: ir.Value, kept: Ids) -> None:
    tensor = weight.const_value
    assert tensor is not None
    chosen = select_part(tensor, kept, None)
    weight.const_value, weight.shape = chosen, ir.Shape(concrete_shape(chosen))
    for user, _ in weight.uses():
        if user.op_type in ("Transpose", "Cast"):
            user.outputs[0].shape = None


def _trim_logits(graph: ir.Graph, head: Product, rows: int, kept: Ids) -> None:
    """The vectors that are added to logits or scale them, and the shapes on the way to the output."""
    linear = match_linear(head.node)
    assert linear is not None
    if linear.bias is not None:
        _keep_last(linear.bias, rows, kept)
    value = head.node.outputs[0]
    while not value.is_graph_output():
        value.shape = None
        users = [user for user, _ in value.uses()]
        if len(users) != 1 or users[0].op_type not in _POINTWISE:
            found = ", ".join(user.op_type for user in users)
            raise UnsupportedModelError(f"between the head and the logits is {found}, which may need every token")
        for other in users[0].inputs:
            if other is not None and other is not value:
                _keep_last(other, rows, kept)
        value = users[0].outputs[0]
    if value.shape is not None:
        value.shape = ir.Shape([*list(value.shape)[:-1], len(kept)])


def _keep_last(value: ir.Value, rows: int, kept: Ids) -> None:
    """Keep a constant's entries along its last axis, where it has one for each token."""
    tensor = value.const_value
    if tensor is None:
        raise UnsupportedModelError(f"the logits are combined with {value.name}, which is computed")
    shape = concrete_shape(tensor)
    if not shape or shape[-1] != rows:
        return
    if len(value.uses()) > 1 or not value.is_initializer():
        raise UnsupportedModelError(f"{value.name} is shared: its other readers would not fit any more")
    chosen = ir.tensor(np.ascontiguousarray(tensor.numpy()[..., kept]), name=value.name)
    value.const_value, value.shape = chosen, ir.Shape(concrete_shape(chosen))


def _renumber_comparisons(graph: ir.Graph, lookups: set[ir.Node], kept: Ids) -> None:
    """Give ids that the graph compares its input with, such as the one that pads, their new numbers."""
    pending = [value for value in graph.inputs if value.name in _INPUTS]
    for value in _handed_on(pending):
        for node, index in list(value.uses()):
            if node in lookups or node.op_type in _RESHAPED or node.op_type in _ORDERED:
                continue
            other = node.inputs[1 - index] if node.op_type in _COMPARED else None
            number = scalar(other)
            if other is None or number is None:
                raise UnsupportedModelError(f"the graph computes with token ids: {node.op_type} {node.name}")
            new = int(np.searchsorted(kept, number))
            if new == len(kept) or kept[new] != number:
                raise UnsupportedModelError(f"the graph looks for token {number:g}, which is not kept")
            if new != number:
                array = np.array(new, other.dtype.numpy() if other.dtype is not None else np.int64)
                node.replace_input_with(1 - index, add_constant(graph, f"token_{new}.{array.dtype}", array))


def _handed_on(values: Sequence[ir.Value]) -> Iterator[ir.Value]:
    """The values and all that hands them on."""
    pending = list(values)
    while pending:
        value = pending.pop()
        yield value
        pending += [user.outputs[0] for user, _ in value.uses() if user.op_type in _RESHAPED]
