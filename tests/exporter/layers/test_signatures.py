from __future__ import annotations

from onnxpress.exporter import architectures, tasks
from onnxpress.exporter.layers import signatures
from onnxpress.exporter.layers.traced import on_meta


def stack_of(architecture: str, **changes: object) -> signatures.Stack:
    config = architectures.tiny_config(architecture, **changes)
    task = architectures.catalog()[architecture]["task"]
    stack = signatures.find_stack(on_meta(tasks.model_class(config, task), config))
    assert stack is not None
    return stack


def test_equal_layers_are_one_signature() -> None:
    assert stack_of("llama") == signatures.Stack("model.layers", (0, 0, 0, 0))


def test_layer_types_make_signatures() -> None:
    assert stack_of("gemma3_text").signatures == (0, 0, 0, 0, 0, 5, 0, 0)


def test_layers_without_rotation_are_other_signatures() -> None:
    assert stack_of("smollm3").signatures == (0, 1, 0, 1)


def test_a_scalar_that_differs_by_layer_makes_signatures() -> None:
    assert stack_of("gpt2", scale_attn_by_inverse_layer_idx=True).signatures == (0, 1, 2, 3)


def test_the_first_layer_of_t5_owns_the_position_bias() -> None:
    assert stack_of("t5").signatures == (0, 1, 1, 1)


def test_traced_layers_have_the_edges_and_every_signature() -> None:
    assert signatures.choose_traced_layers((0, 0, 0, 0)) == (0, 1)
    assert signatures.choose_traced_layers((0, 1, 1, 1)) == (0, 1)
    assert signatures.choose_traced_layers((0, 1, 1, 1), extra=1) == (0, 1, 2)
    assert signatures.choose_traced_layers((0, 0, 0, 3, 0)) == (0, 1, 3)
