"""Each translation of an ATen operator against torch itself, at sizes that the trace has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter.layers.trace import trace
from onnxpress.exporter.tracing.recorder import CannotRecord

F, N, B = torch.float32, torch.int64, torch.bool
TRACED = {"a": 5, "b": 7, "c": 11, "past_d": 3}
"""Free dimensions and the sizes that they have while tracing."""
Spec = tuple[tuple[str | int, ...], torch.dtype]


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Any], model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model or nn.Identity()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def traced(function: Callable[..., Any], specs: Sequence[Spec], model: nn.Module | None = None) -> ir.Model:
    examples = tuple(torch.zeros([TRACED.get(dim, dim) for dim in dims], dtype=dtype) for dims, dtype in specs)
    free = tuple({axis: dim for axis, dim in enumerate(dims) if isinstance(dim, str)} for dims, _ in specs)
    count = len(examples)
    with torch.no_grad():
        results = function(*examples)
    outputs = [f"y{n}" for n in range(len(results) if isinstance(results, (tuple, list)) else 1)]
    return trace(Calls(function, model), examples, (free,), [f"x{n}" for n in range(count)], outputs)


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def values(dims: Sequence[str | int], dtype: torch.dtype, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    shape = [sizes.get(dim, dim) for dim in dims]
    if dtype == F:
        return torch.randn(shape, generator=generator)
    return torch.randint(0, 2 if dtype == B else 5, shape, generator=generator).to(dtype)


SAME: list[Spec] = [(("a", 4, "b"), F)]
TWO: list[Spec] = [(("a", 4, "b"), F), ((4, "b"), F)]
MIXED: list[Spec] = [(("a", 4, "b"), F), (("b",), N)]
WHOLE: list[Spec] = [(("a", 4, "b"), N), (("a", 4, 1), N)]
TRUTH: list[Spec] = [(("a", "b"), B), (("b",), B)]
IMAGE: list[Spec] = [(("a", 6, 8, 9), F), ((4, 3, 3, 3), F), ((4,), F)]

CASES: dict[str, tuple[Callable[..., Any], list[Spec]]] = {
    # elementwise
    **{
        name: (getattr(torch, name), SAME)
        for name in "exp sin cos tanh sigmoid erf abs neg sign relu ceil floor round reciprocal isnan".split()
    },
    **{f"{name} of integers": (getattr(torch, name), WHOLE[:1]) for name in "exp tanh abs neg sign".split()},
    "of positive numbers": (
        lambda x: [f(x.abs() + 0.1) for f in (torch.sqrt, torch.log, torch.rsqrt, torch.log1p)],
        SAME,
    ),
    **{name: (getattr(torch, name), TWO) for name in "add sub mul div maximum minimum eq ne lt le gt ge".split()},
    **{f"{name} mixed": (getattr(torch, name), MIXED) for name in "add sub mul div eq lt ge rsub".split()},
    **{f"{name} of integers": (getattr(torch, name), WHOLE) for name in "add sub mul div maximum ne gt".split()},
    **{
        f"{name} of bools": (getattr(torch, name), TRUTH)
        for name in "logical_and logical_or logical_xor eq mul".split()
    },
    "bitwise": (lambda x, y: ((x & y) | ~x) ^ y, TRUTH),
    "bitwise of integers": (lambda x, y: ((x & y) | ~x) ^ y, WHOLE),
    "add with alpha": (lambda x, y: torch.add(x, y, alpha=3), MIXED),
    "add a size": (lambda x: x + x.shape[0] * 2 - x.shape[2], SAME),
    "floor of a quotient": (lambda x, y: torch.div(x - 2, y + 1, rounding_mode="floor"), WHOLE),
    "whole part of a quotient": (lambda x, y: torch.div(x - 2, y + 1, rounding_mode="trunc"), WHOLE),
    "remainder": (lambda x, y: torch.remainder(x - 2, y + 1), WHOLE),
    "remainder of floats": (lambda x: torch.remainder(x, 0.75), SAME),
    "floor of a quotient of floats": (lambda x: torch.div(x, 0.75, rounding_mode="floor"), SAME),
    "whole part of a quotient of floats": (lambda x: torch.div(x, 0.75, rounding_mode="trunc"), SAME),
    "power": (lambda x: x**3 + x.abs() ** 0.5 + x.abs() ** 1.5, SAME),
    "power of integers": (lambda x: x**2, WHOLE[:1]),
    "number to a power": (lambda x: 2.0**x, SAME),
    "clamp": (lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + x.clamp(max=0.2), SAME),
    "clamp integers": (lambda x: x.clamp(min=1), WHOLE[:1]),
    "clamp by tensors": (lambda x, y: torch.clamp(x, min=y), TWO),
    "gelu": (lambda x: functional.gelu(x) + functional.gelu(x, approximate="tanh"), SAME),
    "silu": (functional.silu, SAME),
    "mish": (functional.mish, SAME),
    "softplus": (functional.softplus, SAME),
    "leaky_relu": (lambda x: functional.leaky_relu(x, 0.2), SAME),
    "elu": (lambda x: functional.elu(x, 0.7), SAME),
    "hard": (lambda x: functional.hardtanh(x) + functional.hardswish(x) + functional.hardsigmoid(x), SAME),
    "where": (lambda x, y: torch.where(x > y, x, y), TWO),
    "where numbers": (lambda x: torch.where(x > 0, 0.0, -1e3), SAME),
    "where mixed": (lambda x, y: torch.where(x > y, x, y), MIXED),
    "masked_fill": (lambda x, y: x.masked_fill(y > 0, -7.5), TWO),
    "casts": (lambda x: (x.to(N).to(torch.float16).to(F), (x > 0).to(torch.int32), x.bool()), SAME),
    # shapes
    "view": (lambda x: x.view(-1, 4, x.shape[2]).reshape(x.shape[0] * 4, -1), SAME),
    "flatten": (lambda x: x.flatten(1).flatten(), SAME),
    "heads": (lambda x: x.view(x.shape[0], 2, 2, -1).transpose(1, 3).reshape(x.shape[0], -1, 4), SAME),
    "turned twice": (lambda x: x.transpose(0, 2).permute(1, 2, 0) + x.permute(1, 0, 2), SAME),
    "turned back": (lambda x: x.transpose(0, 2).transpose(0, 2) * 2, SAME),
    "t": (lambda x: x.t() * 2, [(("a", "b"), F)]),
    "unsqueeze": (lambda x: x[:, None].unsqueeze(-1), SAME),
    "squeeze": (lambda x: (x[:, :1].squeeze(1), x[:, :1].squeeze(), x.squeeze(-1) * 2), SAME),
    "expand": (lambda x: x[:, :1].expand(-1, 3, -1) + x[:1].expand(x.shape[0], 4, -1)[:, :3], SAME),
    "expand more": (lambda x: x.expand(2, -1, -1, -1), SAME),
    "repeat": (lambda x: x.repeat(2, 1, 3)[0:] + 1, SAME),
    "repeat more": (lambda x: x.repeat(2, 1, x.shape[0], 1), SAME),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, dim=1), SAME),
    "cat": (lambda x, y: torch.cat((x, y, x), dim=-1), [(("a", 2), F), (("a", 3), N)]),
    "stack": (lambda x: torch.stack((x, x * 2), dim=-1), SAME),
    "slices": (lambda x: (x[..., ::2], x[:, 1:3], x[:, -2:], x[..., :-1]), [(("a", 4, 6), F)]),
    "slice by a size": (lambda x, y: y[:, y.shape[1] - x.shape[1] :], [((2, "b"), F), ((2, 40), F)]),
    "select": (lambda x: x[:, 2] + x[:, -1], SAME),
    "split": (lambda x: x.split([1, 3], dim=1), SAME),
    "chunk": (lambda x: x.chunk(2, dim=1), SAME),
    "unbind": (lambda x: x.unbind(1), SAME),
    "flip": (lambda x: x.flip(0, 2), SAME),
    "pad": (lambda x: functional.pad(x, (1, 2, 0, 1), value=2.5), SAME),
    "pad away": (lambda x: functional.pad(x, (0, 0, -1, 1)), SAME),
    "triangles": (lambda x: x.tril(1) + x.triu(-1), SAME),
    "embedding": (lambda i, w: functional.embedding(i, w), [(("a", "b"), N), ((5, 3), F)]),
    "gather": (lambda x, i: x.gather(1, i), [(("a", 5), F), (("a", 3), N)]),
    "scatter": (lambda x, i: x.scatter(1, i, 2.0), [(("a", 5), F), (("a", 1), N)]),
    "index one": (lambda x, i: x[:, i], [(("a", 5, "b"), F), (("c", 2), N)]),
    "index several": (lambda x, i, j: x[i, j], [((5, 5, "b"), F), (("a", 1), N), (("c",), N)]),
    "index neighbours": (lambda x, i, j: x[:, i, j], [(("a", 5, 5, "b"), F), (("c",), N), (("c",), N)]),
    "index apart": (lambda x, i, j: x[i, :, j], [((5, "a", 5), F), (("c",), N), (("c",), N)]),
    "index from the end": (lambda x, i: x[torch.arange(i.shape[0]), i - 5], [(("a", 5), F), (("a",), N)]),
    "topk": (lambda x: x.topk(3, dim=1)[0], SAME),
    "arange": (lambda x: torch.arange(x.shape[0]) * 2 + torch.arange(2, x.shape[0] + 2), SAME),
    "arange by steps": (lambda x: torch.arange(0, x.shape[0] * 3, 3, dtype=F), SAME),
    "made of one number": (
        lambda x: (torch.zeros(x.shape[0], 2), torch.ones_like(x), x.new_full((3, x.shape[2]), 2)),
        SAME,
    ),
    "a size as a tensor": (lambda x: torch.tensor(x.shape[0]) + torch.full((2,), x.shape[2]), SAME),
    "constants": (lambda x: x * torch.arange(4)[:, None] + torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].exp(), SAME),
    "written in place": (lambda x: (x * 1).add_(2).mul_(3).clamp_(min=0), SAME),
    # reductions
    **{
        f"reductions along {dim}": (
            lambda x, dim=dim: [
                f(x, dim=dim, keepdim=keep)
                for f in (torch.sum, torch.mean, torch.amax, torch.amin)
                for keep in (True, False)
            ],
            SAME,
        )
        for dim in (0, -1, (0, 2))
    },
    "sum of all": (lambda x: x.sum() + x.mean() + x.max() + x.min(), SAME),
    "sum of integers": (lambda x: (x.sum(-1), x.cumsum(0), (x > 2).sum(1), (x > 2).cumsum(1)), WHOLE[:1]),
    "extremes by axis": (lambda x: (x.max(1)[0], x.argmax(1), x.argmin(-1, keepdim=True), x.argmax()), SAME),
    "smallest by axis": (lambda x: x.min(-1), SAME),
    "sorted": (lambda x: (*x.sort(dim=1), *x.sort(dim=-1, descending=True)), SAME),
    "truths": (lambda x, y: (x.any(), x.all(1), x.any(-1, keepdim=True)), TRUTH),
    "variance": (lambda x: x.var(1, keepdim=True) + x.var(1, correction=0, keepdim=True), SAME),
    "softmax": (lambda x: (x.softmax(-1), x.log_softmax(1), x.logsumexp(-1)), SAME),
    "softmax of integers": (lambda x: x.softmax(-1, dtype=F), WHOLE[:1]),
    "norm": (lambda x: (functional.normalize(x, dim=1), x.norm(p=1, dim=-1)), SAME),
    "layer norm": (
        lambda x, w: functional.layer_norm(x, (4,), w, w * 2, 1e-3) + functional.layer_norm(x, (4,)),
        [(("a", "b", 4), F), ((4,), F)],
    ),
    "group norm": (  # a large epsilon, so that two values close to each other do not blow up rounding
        lambda x, w: (
            [functional.group_norm(x, groups, w, w * 2, eps=0.01) for groups in (2, 6)]
            + [functional.group_norm(x, 2, w, eps=0.01), functional.group_norm(x, 3, eps=0.01)]
        ),
        [(("a", 6, "c"), F), ((6,), F)],
    ),
    "batch norm": (
        lambda x, w: functional.batch_norm(x, w, w.abs() + 1, w, w * 2, training=False),
        [(("a", 6, "c"), F), ((6,), F)],
    ),
    # products
    "matmul": (torch.matmul, [(("a", 1, "b", 4), F), ((3, 4, "c"), F)]),
    "bmm": (torch.bmm, [(("a", "b", 4), F), (("a", 4, 3), F)]),
    "addmm": (lambda b, x, y: torch.addmm(b, x, y, beta=0.5, alpha=2), [((3,), F), (("a", 4), F), ((4, 3), F)]),
    "baddbmm": (
        lambda b, x, y: torch.baddbmm(b, x, y, beta=0, alpha=0.5) + torch.baddbmm(b, x, y),
        [(("a", 1, 3), F), (("a", "b", 4), F), (("a", 4, 3), F)],
    ),
    "einsum": (lambda x, y: torch.einsum("bld,bmd->blm", x, y), [(("a", "b", 4), F), (("a", "c", 4), F)]),
    "conv2d": (
        lambda x, w, b: functional.conv2d(x, w, b, stride=2, padding=(1, 0), dilation=(1, 2), groups=2),
        IMAGE,
    ),
    "conv1d": (
        lambda x, w: functional.conv1d(functional.conv1d(x, w, stride=5), w, stride=2)[..., :-1].flatten(1),
        [(("a", 2, 60), F), ((2, 2, 3), F)],
    ),
    "conv_transpose1d": (
        lambda x, w: functional.conv_transpose1d(x, w, stride=2, padding=1, output_padding=1),
        [(("a", 3, "b"), F), ((3, 2, 4), F)],
    ),
    "pooling": (
        lambda x: (functional.max_pool2d(x, 3, 2, 1), functional.avg_pool2d(x, 2), functional.avg_pool2d(x, 3, 1, 1)),
        IMAGE[:1],
    ),
}


@cache
def case(name: str) -> onnxruntime.InferenceSession:
    return session(traced(*CASES[name]))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_same_as_torch(name: str, data: st.DataObject) -> None:
    function, specs = CASES[name]
    sizes = {dim: data.draw(st.integers(2 if name in {"squeeze", "group norm"} else 1, 6), label=dim) for dim in TRACED}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    inputs = [values(dims, dtype, sizes, generator) for dims, dtype in specs]
    wanted = function(*inputs)
    found = case(name).run(None, {f"x{n}": tensor.numpy() for n, tensor in enumerate(inputs)})
    for one, other in zip(found, wanted if isinstance(wanted, (tuple, list)) else [wanted], strict=True):
        assert one.dtype == other.numpy().dtype
        # float32 sums of up to a few hundred terms in another order
        np.testing.assert_allclose(one, other.numpy(), rtol=2e-5, atol=2e-5)


def test_an_empty_past_can_be_reshaped() -> None:
    """-1 cannot be worked out of no elements, and 0 must not stand for the input's dimension."""
    function = lambda x: (x.reshape(-1, x.shape[2], 4), x.flatten(1), x.transpose(1, 2).reshape(x.shape[0], -1, 12))  # noqa: E731
    model = session(traced(function, [(("a", 3, "past_d", 4), F)]))
    for length in (0, 2):
        x = torch.randn(2, 3, length, 4)
        for one, other in zip(
            model.run(None, {"x0": x.numpy()}),
            function(x) if length else [torch.zeros(6, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, 12)],
            strict=True,
        ):
            np.testing.assert_array_equal(one, other.numpy())


def refused_data(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def refused_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:] = 0
    return y


def refused_alias(x: Tensor) -> Tensor:
    y = x * 2
    z = y.view(-1)
    y += 1
    return z


REFUSED: dict[str, tuple[Callable[..., Any], list[Spec], str]] = {
    "values decide": (refused_data, SAME, "values of its inputs|data-dependent|data dependent"),
    "writes into a part": (refused_view, SAME, "writes into part"),
    "another view of what is written": (refused_alias, SAME, "writes into part"),
    "an unknown operator": (lambda x: torch.linalg.det(x @ x.transpose(1, 2)), SAME, "no translation of the operator"),
    "random numbers": (lambda x: x + torch.rand(4, 1), SAME, "no translation of the operator"),
    "variance over a free dimension": (lambda x: x.var(2), SAME, "free dimension"),
    "an overload with other arguments": (
        lambda x: x.round(decimals=1),
        SAME,
        "aten.round.decimals with these arguments",
    ),
    "a sum of bools": (lambda x, y: torch.add(x, y), TRUTH, "bools"),
    "pooling that rounds up": (lambda x: functional.max_pool2d(x, 3, 2, ceil_mode=True), IMAGE[:1], "rounds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused(name: str) -> None:
    function, specs, reason = REFUSED[name]
    with pytest.raises(Exception, match=reason) as caught:
        traced(function, specs)
    assert isinstance(caught.value, CannotRecord) or "ata" in type(caught.value).__name__


def test_a_size_that_is_not_free_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="only takes a = 5"):
        traced(lambda x: x.reshape(5, -1) + torch.zeros(5, 1), [(("a", 4), F)])


def test_its_own_state_may_not_be_written() -> None:
    model = nn.Module()
    model.register_buffer("count", torch.zeros(4), persistent=False)
    with pytest.raises(CannotRecord, match="own state"):
        traced(lambda x: x + model.count.add_(1)[:, None], SAME, model)


def test_parameters_have_no_values_and_linear_layers_one_node() -> None:
    model = nn.Linear(4, 3)
    graph = traced(lambda x: model(x), [(("a", 4), F)], model).graph
    assert [node.op_type for node in graph] == ["Linear"]
    assert {name: value.const_value for name, value in graph.initializers.items()} == {"weight": None, "bias": None}


def test_nothing_is_written_twice_and_nothing_that_is_not_needed() -> None:
    graph = traced(lambda x: [x.exp().cos(), x.exp() * 2 + 0 * x.shape[0], x.tanh()][:2], SAME).graph
    assert [node.op_type for node in graph].count("Exp") == 1
    assert "Tanh" not in [node.op_type for node in graph]


def test_sizes_come_from_the_first_input_that_has_them() -> None:
    specs: list[Spec] = [(("a", "b"), F), (("b", "a"), F)]
    graph = traced(lambda x, y: y.reshape(-1) + torch.arange(y.shape[0] * y.shape[1]) + x.reshape(-1), specs).graph
    assert {node.inputs[0].name for node in graph if node.op_type == "Shape" and node.inputs[0]} == {"x0"}


def test_known_tensors_may_be_written_whole_and_are_constants() -> None:
    graph = traced(lambda x: x * torch.zeros(4, 1).add_(2).exp_(), SAME).graph
    assert [node.op_type for node in graph] == ["Mul"]


def test_names_of_dimensions_reach_the_outputs() -> None:
    graph = traced(lambda x, y: torch.cat((x, y), dim=1), [(("a", "b"), F), (("a", "c"), F)]).graph
    assert graph.outputs[0].shape == ir.Shape(["a", "b + c"])
