"""A graph of a few template layers to the graph of the whole model.

Layers of one kind differ in their parameters and their cache only. So the nodes of a traced layer are copied once per
layer of its kind; the values that cross a layer's edge are told apart by where they come from:

- the prologue (masks, positions, tables): every copy uses the same value;
- the layer before: each copy uses what the copy before it made;
- one certain earlier layer (T5's position bias, made by layer 0): every copy uses that layer's value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxpress.exporter.kinds import Stack
from onnxpress.exporter.trace import MODULE

PROLOGUE, EPILOGUE = -1, 1 << 30


class CannotStamp(Exception):
    """The template does not say what flows where; `retry` tells whether one more traced layer would."""

    def __init__(self, reason: str, retry: bool = False) -> None:
        super().__init__(reason)
        self.retry = retry


@dataclass
class _Layer:
    nodes: list[ir.Node] = field(default_factory=list)
    crossing: list[ir.Value] = field(default_factory=list)
    """Values of earlier template layers (or, for the first layer, of the prologue) that its nodes use."""


def stamp(template: ir.Model, stack: Stack, chosen: tuple[int, ...], path: str) -> ir.Model:
    """Repeat the template's layers until there are `stack.depth` of them.

    chosen: the layers that were traced, by their index in the full model. path: of the layers in the traced module,
    whose indices count the traced layers only. Raises CannotStamp.
    """
    _rename_layers(template, path, chosen)
    layers = _partition(template, path, chosen)
    template_layers = [layers[index] for index in chosen]
    chain_in, fixed = _flows(template_layers, chosen)
    representative = _representatives(stack.kinds, chosen)
    return _Stamper(template, stack, path, chosen, layers, chain_in, fixed, representative).run()


def _rename_layers(template: ir.Model, path: str, chosen: tuple[int, ...]) -> None:
    """Traced layers are numbered 0, 1, …; give them their number in the full model, in parameters and module names."""
    pattern = re.compile(rf"^{re.escape(path)}\.(\d+)(?=\.|$)")

    def renamed(name: str) -> str:
        return pattern.sub(lambda found: f"{path}.{chosen[int(found[1])]}", name)

    values = list(template.graph.initializers.values())
    for value in values:
        template.graph.initializers.pop(value.name or "")
    for value in values:
        value.name = renamed(value.name or "")
        template.graph.initializers.add(value)
    for node in template.graph:
        if MODULE in node.metadata_props:
            node.metadata_props[MODULE] = renamed(node.metadata_props[MODULE])


def _partition(template: ir.Model, path: str, chosen: tuple[int, ...]) -> dict[int, _Layer]:
    """Sort nodes into prologue, layers and epilogue, by what they depend on."""
    pattern = re.compile(rf"^{re.escape(path)}\.(\d+)(?=\.|$)")
    place: dict[ir.Node, int] = {}
    layers: dict[int, _Layer] = {PROLOGUE: _Layer(), EPILOGUE: _Layer(), **{index: _Layer() for index in chosen}}

    def layer_of_name(name: str | None) -> int | None:
        found = pattern.match(name or "") or re.match(r"^past_key_values\.(\d+)\.", name or "")
        return int(found[1]) if found else None

    for node in template.graph:
        sources = [value for value in node.inputs if value is not None]
        below = [place[producer] for value in sources if (producer := value.producer()) is not None]
        # the shape of a cache is the same in every layer
        own = {
            index for value in sources if (index := layer_of_name(value.name)) is not None and node.op_type != "Shape"
        }
        if any(isinstance(attribute.value, ir.Graph) for attribute in node.attributes.values()):
            raise CannotStamp(f"{node.op_type} has a subgraph")
        scope = layer_of_name(node.metadata_props.get(MODULE))
        depends = max([*below, *own, PROLOGUE])
        if scope is not None and scope in layers and depends <= scope:
            # what a layer computes from the prologue alone is shared, unless it is part of its main path
            where = scope if depends != PROLOGUE or _on_main_path(node) else PROLOGUE
        elif depends in (PROLOGUE, EPILOGUE):
            where = depends
        else:
            where = EPILOGUE if depends == chosen[-1] else depends
        if own and max(own) > where:
            raise CannotStamp(f"{node.op_type} mixes parameters of several layers")
        place[node] = where
        layers[where].nodes.append(node)
    for index in chosen:
        inside = {output for node in layers[index].nodes for output in node.outputs}
        seen: dict[ir.Value, None] = {}
        for node in layers[index].nodes:
            for value in node.inputs:
                if value is None or value in inside:
                    continue
                producer = value.producer()
                if producer is not None and (place[producer] != PROLOGUE or index == chosen[0]):
                    seen.setdefault(value)
        layers[index].crossing = list(seen)
    return layers


def _on_main_path(node: ir.Node) -> bool:
    """A node of the first layer fed by the prologue alone: its main path starts from the embedding, a float tensor of
    the length of the text; shapes and constants are not of it."""
    return any(
        output.dtype in {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
        and output.shape is not None
        and len(output.shape) == 3
        for output in node.outputs
    )


def _flows(
    layers: list[_Layer], chosen: tuple[int, ...]
) -> tuple[dict[int, list[ir.Value]], dict[int, list[ir.Value]]]:
    """For each template layer after the first: the values that it takes from the layer before it, in order of use, and
    those it takes from a certain earlier layer."""
    made_by = {
        output: position for position, layer in enumerate(layers) for node in layer.nodes for output in node.outputs
    }
    chain: dict[int, list[ir.Value]] = {}
    fixed: dict[int, list[ir.Value]] = {}
    for position, layer in enumerate(layers):
        if position == 0:
            continue
        before = [value for value in layer.crossing if made_by.get(value) == position - 1]
        earlier = [value for value in layer.crossing if made_by.get(value, position - 1) < position - 1]
        if position == 1 and len(before) > 1:
            # either a chain of several values or something that layer 0 alone makes: a second copy tells
            if len(layers) == 2:
                raise CannotStamp("several values flow from the first layer to the second", retry=True)
            later = set(layers[2].crossing)
            earlier = [value for value in before if value in later]
            before = [value for value in before if value not in later]
        chain[chosen[position]] = before
        fixed[chosen[position]] = earlier
    lengths = {len(values) for values in chain.values()}
    if len(lengths) > 1 or lengths == {0}:
        raise CannotStamp("the layers do not pass on the same number of values")
    return chain, fixed


def _representatives(kinds: tuple[int, ...], chosen: tuple[int, ...]) -> list[int]:
    """For each layer of the full model the traced layer that it copies: itself if traced, otherwise the last traced one
    of its kind (the last has the least ambiguous edges)."""
    return [
        index if index in chosen else max(traced for traced in chosen[1:] if kinds[traced] == kinds[index])
        for index in range(len(kinds))
    ]


@dataclass
class _Stamper:
    template: ir.Model
    stack: Stack
    path: str
    chosen: tuple[int, ...]
    layers: dict[int, _Layer]
    chain_in: dict[int, list[ir.Value]]
    fixed: dict[int, list[ir.Value]]
    representative: list[int]

    def run(self) -> ir.Model:
        graph = self.template.graph
        chain_out = self._chain_outputs()
        values: dict[ir.Value, ir.Value] = {}
        for value in graph.inputs:
            if not self._layer_numbered(value.name):
                values[value] = _fresh(value, value.name or "")
        inputs = list(values.values())
        caches: dict[str, ir.Value] = {}
        outputs: dict[str, ir.Value] = {}
        nodes: list[ir.Node] = []
        initializers: dict[str, ir.Value] = {}

        def take(layer: _Layer, mapping: dict[ir.Value, ir.Value], old: int | None, new: int | None) -> None:
            for node in layer.nodes:
                copied = self._copy(node, mapping, old, new, caches, initializers)
                nodes.append(copied)

        take(self.layers[PROLOGUE], values, None, None)
        passed: list[ir.Value] = []
        for index, source in enumerate(self.representative):
            mapping = dict(values)
            if index:
                mapping.update(zip(self.chain_in[source], passed, strict=True))
            take(self.layers[source], mapping, source, index)
            passed = [mapping[value] for value in chain_out[source]]
            if index in self.chosen:
                # a value that later layers take from this very layer
                taken = {value for fixed in self.fixed.values() for value in fixed}
                values.update({value: mapping[value] for value in taken if value in mapping and value not in values})
            for value in graph.outputs:
                if value in mapping and self._layer_numbered(value.name):
                    outputs[_renumber(value.name or "", source, index)] = mapping[value]
        values.update(zip(chain_out[self.chosen[-1]], passed, strict=True))
        take(self.layers[EPILOGUE], values, None, None)
        for value in graph.outputs:
            if not self._layer_numbered(value.name):
                outputs[value.name or ""] = values[value]
        inputs += [caches[name] for name in self._numbered(graph.inputs) if name in caches]
        ordered = [value.name or "" for value in graph.outputs if not self._layer_numbered(value.name)]
        ordered += [name for name in self._numbered(graph.outputs) if name in outputs]
        for name, value in outputs.items():
            value.name = name
        stamped = ir.Graph(
            inputs,
            [outputs[name] for name in ordered],
            nodes=nodes,
            initializers=list(initializers.values()),
            opset_imports=graph.opset_imports,
            name="main_graph",
        )
        return ir.Model(stamped, ir_version=self.template.ir_version, producer_name="onnxpress")

    def _chain_outputs(self) -> dict[int, list[ir.Value]]:
        """What each template layer hands on: what the next one takes, or for the last what the epilogue takes."""
        result: dict[int, list[ir.Value]] = {}
        for position, index in enumerate(self.chosen):
            if position + 1 < len(self.chosen):
                result[index] = self.chain_in[self.chosen[position + 1]]
        last = self.chosen[-1]
        made = {output for node in self.layers[last].nodes for output in node.outputs}
        used = dict.fromkeys(v for node in self.layers[EPILOGUE].nodes for v in node.inputs if v in made)
        used |= dict.fromkeys(v for v in self.template.graph.outputs if v in made and not self._layer_numbered(v.name))
        result[last] = list(used)
        if len(result[last]) != len(result[self.chosen[0]]):
            raise CannotStamp("what follows the layers takes other values than the layers pass on")
        outside = [
            value
            for node in self.layers[EPILOGUE].nodes
            for value in node.inputs
            if value is not None
            and value not in made
            and any(value in layer_node.outputs for index in self.chosen for layer_node in self.layers[index].nodes)
        ]
        if outside:
            raise CannotStamp("what follows the layers takes values of several layers")
        return result

    def _layer_numbered(self, name: str | None) -> bool:
        return re.match(r"^(past_key_values|present)\.\d+\.", name or "") is not None

    def _numbered(self, values: Sequence[ir.Value]) -> list[str]:
        """The names of cache inputs or outputs for every layer, in the order of the template's."""
        names = [value.name or "" for value in values if self._layer_numbered(value.name)]
        parts = dict.fromkeys(tuple(re.split(r"\.\d+\.", name, maxsplit=1)) for name in names)
        return [f"{kind}.{index}.{part}" for index in range(self.stack.depth) for kind, part in parts]

    def _copy(
        self,
        node: ir.Node,
        mapping: dict[ir.Value, ir.Value],
        old: int | None,
        new: int | None,
        caches: dict[str, ir.Value],
        initializers: dict[str, ir.Value],
    ) -> ir.Node:
        def resolved(value: ir.Value | None) -> ir.Value | None:
            if value is None:
                return None
            if value.is_initializer():
                name = self._own_name(value.name or "", old, new)
                if name not in initializers:
                    initializers[name] = _fresh(value, name)
                return initializers[name]
            if value.is_graph_input() and self._layer_numbered(value.name):
                name = value.name or ""
                if old is not None and new is not None:
                    name = _renumber(name, old, new)
                if name not in caches:
                    caches[name] = _fresh(value, name)
                return caches[name]
            return mapping[value]

        outputs = []
        for value in node.outputs:
            name = value.name or ""
            fresh = _fresh(value, name if new is None else f"{self.path}.{new}/{name}")
            mapping[value] = fresh
            outputs.append(fresh)
        copied = ir.Node(
            node.domain,
            node.op_type,
            [resolved(value) for value in node.inputs],
            node.attributes.values(),
            overload=node.overload,
            outputs=outputs,
            version=node.version,
            name=None,
        )
        module = node.metadata_props.get(MODULE)
        if module is not None:
            copied.metadata_props[MODULE] = self._own_name(module, old, new)
        return copied

    def _own_name(self, name: str, old: int | None, new: int | None) -> str:
        """`model.layers.1.mlp` -> `model.layers.7.mlp` where the layer is the one being copied; other layers' stay."""
        if old is None or new is None:
            return name
        prefix = f"{self.path}.{old}"
        if name == prefix or name.startswith(f"{prefix}."):
            return f"{self.path}.{new}{name[len(prefix) :]}"
        return name


def _renumber(name: str, old: int, new: int) -> str:
    return re.sub(rf"^(past_key_values|present)\.{old}\.", rf"\1.{new}.", name)


def _fresh(value: ir.Value, name: str) -> ir.Value:
    fresh = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    return fresh
