"""Take layers out of a graph, so that it is the graph that a checkpoint with fewer layers would give.

The layer after a removed one reads what the removed one read. Its nodes, weights, `past_key_values.i` and `present.i`
go; the layers that stay are numbered from 0 in all names: of weights, of the cache, of nodes and values, and of the
modules that the exporter recorded. `onnxpress.layers` in the graph's metadata tells where they came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes import common

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Anatomy, Block, anatomy_of
from onnxpress.graph.conventions import LAYERS, MERGED, MODULE, layer_of

_CACHE = re.compile(r"^(past_key_values|present(?:_key_values)?)\.(\d+)(?=\.)")
_NUMBER = re.compile(r"(?:^|.*?[./])(?:layers?|h|blocks?)[./](\d+)(?=[./]|$)")


def stacks_of(anatomy: Anatomy) -> dict[str, list[Block]]:
    """The blocks of each stack of layers, by its path: `model.layers`."""
    stacks: dict[str, list[Block]] = {}
    for block in anatomy.blocks:
        stacks.setdefault(block.title.rpartition(".")[0], []).append(block)
    for blocks in stacks.values():
        if len(blocks) > 1 and len(blocks[-1].outputs) != 1:
            blocks[-1] = _without_pooling(blocks[-1], blocks[-2])
    return stacks


def _without_pooling(last: Block, before: Block) -> Block:
    """The last block with the states that it makes as its output, where what follows without a weight, such as the mean
    over tokens, counts as part of it: they come from a node like the one that makes those of the block before."""
    model = before.outputs[0].producer()
    wanted = _role(model) if model is not None else None
    like = [output for node in last.nodes if _role(node) == wanted for output in node.outputs[:1]]
    return replace(last, outputs=(like[-1],)) if like else last


def _role(node: ir.Node) -> tuple[str, str]:
    """An operator and the module that it comes from, whatever its layer."""
    module = node.metadata_props.get(MODULE, "")
    layer = layer_of(f"{module}.")
    return node.op_type, module if layer is None else renumbered(module, layer[0], {layer[1]: 0})


def layers_left(model: ir.Model, stack: str, depth: int) -> list[int]:
    """The original index of each of the `depth` layers that a stack has by now."""
    recorded = json.loads(model.metadata_props.get(LAYERS, "{}"))
    return [int(index) for index in recorded.get(stack, range(depth))]


def note_merge(model: ir.Model, stack: str, depth: int, host: int, run: Collection[int]) -> None:
    """Record that layers of a stack, by their present indices, were added to the layer `host`, with all that theirs
    had taken in before."""
    origin = layers_left(model, stack, depth)
    recorded = json.loads(model.metadata_props.get(MERGED, "{}"))
    known = recorded.setdefault(stack, {})
    taken = [index for layer in run for index in (origin[layer], *known.pop(str(origin[layer]), []))]
    known[str(origin[host])] = sorted([*known.get(str(origin[host]), []), *taken])
    model.metadata_props[MERGED] = json.dumps(recorded)


def require_single_states(block: Block) -> None:
    """Raise UnsupportedModelError unless a block reads and makes one tensor of hidden states of the same width."""
    if len(block.hidden) != 1 or len(block.outputs) != 1:
        raise UnsupportedModelError(
            f"{block.title} reads {len(block.hidden)} tensors of hidden states and makes {len(block.outputs)}; "
            "taking it out needs 1 and 1",
            hint="put reduce-depth before fuse-skip-norm",
        )
    (hidden,), (output,) = block.hidden, block.outputs
    widths = [value.shape[-1] for value in (hidden, output) if value.shape is not None and len(value.shape)]
    if len(widths) == 2 and all(isinstance(width, int) for width in widths) and widths[0] != widths[1]:
        raise UnsupportedModelError(f"{block.title} reads states of {widths[0]} features and makes {widths[1]}")


def cut_layers(model: ir.Model, stack: str, dropped: Collection[int]) -> None:
    """Take the layers `dropped` out of a stack and number the others again.

    Raises UnsupportedModelError, naming the layer, where later layers read what one of them computes, or where names
    do not tell which cache is whose. The graph is then half edited: throw it away.
    """
    anatomy = anatomy_of(model)
    blocks = stacks_of(anatomy)[stack]
    depth = len(blocks)
    origin = layers_left(model, stack, depth)
    kept = [index for index in range(depth) if index not in dropped]
    caches = _caches(model.graph, anatomy, stack)
    for index in sorted(dropped, reverse=True):
        require_single_states(blocks[index])
        _bridge(blocks[index])
    _drop_caches(model.graph, caches, set(dropped), kept[0])
    common.RemoveUnusedNodesPass()(model)
    for index in sorted(dropped):
        _check_gone(blocks[index])
    _drop_inputs(model.graph, caches, set(dropped))
    # What a removed layer leaves to others, such as T5's position bias, goes to the next that stays.
    numbers = {index: sum(other < index for other in kept) for index in range(depth)}
    numbers = {index: min(number, len(kept) - 1) for index, number in numbers.items()}
    _renumber(model, stack, numbers, depth, len(kept), caches)
    recorded = json.loads(model.metadata_props.get(LAYERS, "{}"))
    model.metadata_props[LAYERS] = json.dumps(recorded | {stack: [origin[index] for index in kept]})


def _bridge(block: Block) -> None:
    """Let whatever read a block's output read its input."""
    (hidden,), (output,) = block.hidden, block.outputs
    if output.is_graph_output():
        if hidden.is_graph_output() or hidden.is_graph_input() or hidden.is_initializer():
            raise UnsupportedModelError(f"{block.title}: its input {hidden.name!r} is an output of the graph as well")
        ir.convenience.replace_all_uses_with(output, hidden, replace_graph_outputs=True)
        hidden.name, output.name = output.name, f"{output.name}/removed"
    else:
        ir.convenience.replace_all_uses_with(output, hidden)


def _check_gone(block: Block) -> None:
    computes = [product.node for product in block.products] + [one.node for one in block.attentions]
    left = next((node for node in computes if node.graph is not None), None)
    if left is not None:
        reader = _reader_outside(left, block)
        raise UnsupportedModelError(
            f"{block.title} cannot be removed: {reader} reads what its {left.op_type} {left.name!r} computes",
            hint="choose other layers",
        )


def _reader_outside(node: ir.Node, block: Block) -> str:
    queue, inside = [node], set(block.nodes)
    seen = {node}
    while queue:
        for output in queue.pop().outputs:
            if output.is_graph_output():
                return f"the output {output.name!r}"
            for user, _ in output.uses():
                if user not in inside:
                    return f"{user.op_type} {user.name!r}"
                if user not in seen:
                    seen.add(user)
                    queue.append(user)
    return "another layer"


def _caches(graph: ir.Graph, anatomy: Anatomy, stack: str) -> list[ir.Value]:
    """Inputs and outputs of the graph that hold the cache of a stack."""
    found = [value for value in (*graph.inputs, *graph.outputs) if _CACHE.match(value.name or "")]
    where = {node: segment.title for segment in anatomy.segments if segment.layer is not None for node in segment.nodes}
    owners = set()
    for value in found:
        nodes = [value.producer()] if value.producer() is not None else [user for user, _ in value.uses()]
        layer = _cache_index(value)
        titles = {where[node] for node in nodes if node in where}
        for title in titles:
            owner, _, index = title.rpartition(".")
            owners.add(owner)
            if value.producer() is not None and int(index) != layer:
                raise UnsupportedModelError(f"{title} makes {value.name!r}: caches are not numbered as layers are")
    if len(owners) > 1:
        raise UnsupportedModelError(f"the stacks {', '.join(sorted(owners))} share one numbering of caches")
    return found if stack in owners else []


def _cache_index(value: ir.Value) -> int:
    found = _CACHE.match(value.name or "")
    assert found is not None
    return int(found[2])


def _drop_caches(graph: ir.Graph, caches: list[ir.Value], dropped: set[int], instead: int) -> None:
    """Remove the caches that dropped layers make; who asks one of theirs for its length asks a layer that stays."""
    graph.outputs[:] = [value for value in graph.outputs if value not in caches or _cache_index(value) not in dropped]
    by_name = {value.name: value for value in graph.inputs}
    for value in caches:
        if value.producer() is not None or _cache_index(value) not in dropped:
            continue
        other = by_name.get(_CACHE.sub(rf"\g<1>.{instead}", str(value.name)))
        for user, index in list(value.uses()):
            if user.op_type == "Shape" and other is not None and other.shape == value.shape:
                user.replace_input_with(index, other)


def _drop_inputs(graph: ir.Graph, caches: list[ir.Value], dropped: set[int]) -> None:
    gone = [value for value in caches if value.is_graph_input() and _cache_index(value) in dropped]
    for value in gone:
        if value.uses():
            reader = next(iter(value.uses()))[0]
            raise UnsupportedModelError(
                f"{value.name!r} of a removed layer is read by {reader.op_type} {reader.name!r}"
            )
    graph.inputs[:] = [value for value in graph.inputs if value not in gone]


def renumbered(name: str, stack: str, numbers: Mapping[int, int]) -> str:
    """`model.layers.7.mlp` with the new number of its layer, if it is named after one of the stack."""
    match = _NUMBER.match(name)
    layer = layer_of(f"{name}." if match is not None and match.end() == len(name) else name)
    if match is None or layer is None or layer[0] != stack or layer[1] not in numbers:
        return name
    return f"{name[: match.start(1)]}{numbers[layer[1]]}{name[match.end(1) :]}"


def _renumber(
    model: ir.Model, stack: str, numbers: dict[int, int], depth: int, left: int, caches: list[ir.Value]
) -> None:
    # Some exporters name what follows the last layer as one layer more.
    numbers = numbers | {depth + extra: left + extra for extra in range(2)}
    taken = {value.name for graph in model.graphs() for value in _values(graph)}
    for value in sorted((value for value in caches if value.name is not None), key=_cache_index):
        _rename(value, _CACHE.sub(lambda found: f"{found[1]}.{numbers[int(found[2])]}", str(value.name)), taken)
    named = [value for graph in model.graphs() for value in _values(graph) if value not in caches]
    for value in sorted(named, key=lambda value: (layer_of(value.name) or ("", -1))[1]):
        name = renumbered(str(value.name), stack, numbers)
        if name == value.name:
            continue
        if name in taken and value.is_initializer():
            raise UnsupportedModelError(f"two weights would be called {name!r}: a removed layer leaves one of them")
        while name in taken:
            name += "_"
        _rename(value, name, taken)
    for graph in model.graphs():
        named_nodes: set[str] = set()
        for node in graph:
            if node.name:
                name = renumbered(node.name, stack, numbers)
                while name in named_nodes:  # of two layers that are one by now
                    name += "_"
                named_nodes.add(name)
                node.name = name
            if MODULE in node.metadata_props:
                node.metadata_props[MODULE] = renumbered(node.metadata_props[MODULE], stack, numbers)


def _rename(value: ir.Value, name: str, taken: set[str | None]) -> None:
    taken.discard(value.name)
    if value.const_value is not None:  # a tensor takes its value's name; other graphs may hold the same one
        value.const_value = copy(value.const_value)
    value.name = name
    taken.add(name)


def _values(graph: ir.Graph) -> list[ir.Value]:
    made = [output for node in graph for output in node.outputs]
    return list(dict.fromkeys([*graph.inputs, *graph.initializers.values(), *made]))
