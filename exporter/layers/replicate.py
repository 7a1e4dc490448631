"""A graph of a few traced layers to the graph of the whole model.

Layers with one signature differ in their parameters and their cache only. So the nodes of a traced layer are copied
once per layer with its signature; the values that cross a layer's edge are told apart by where they come from:

- the prologue (masks, positions, tables): every copy uses the same value;
- the layer before: each copy uses what the copy before it made;
- one certain earlier layer (T5's position bias, made by layer 0): every copy uses that layer's value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxpress.exporter.layers.signatures import Stack
from onnxpress.exporter.layers.split import (
    EPILOGUE,
    PROLOGUE,
    CannotReplicate,
    LayerNodes,
    flows,
    partition,
    rename_layers,
    representatives,
)
from onnxpress.graph.conventions import MODULE


def replicate_layers(traced: ir.Model, stack: Stack, chosen: tuple[int, ...], path: str) -> ir.Model:
    """Repeat the traced layers until there are `stack.depth` of them.

    chosen: the layers that were traced, by their index in the full model. path: of the layers in the traced module,
    whose indices count the traced layers only. Raises CannotReplicate.
    """
    rename_layers(traced, path, chosen)
    layers = partition(traced, path, chosen)
    chain_in, fixed = flows([layers[index] for index in chosen], chosen)
    representative = representatives(stack.signatures, chosen)
    return _Replication(traced, stack, path, chosen, layers, chain_in, fixed, representative).run()


@dataclass
class _Replication:
    traced: ir.Model
    stack: Stack
    path: str
    chosen: tuple[int, ...]
    layers: dict[int, LayerNodes]
    chain_in: dict[int, list[ir.Value]]
    fixed: dict[int, list[ir.Value]]
    representative: list[int]

    def run(self) -> ir.Model:
        graph = self.traced.graph
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

        def take(layer: LayerNodes, mapping: dict[ir.Value, ir.Value], old: int | None, new: int | None) -> None:
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
        replicated = ir.Graph(
            inputs,
            [outputs[name] for name in ordered],
            nodes=nodes,
            initializers=list(initializers.values()),
            opset_imports=graph.opset_imports,
            name="main_graph",
        )
        return ir.Model(replicated, ir_version=self.traced.ir_version, producer_name="onnxpress")

    def _chain_outputs(self) -> dict[int, list[ir.Value]]:
        """The values that each traced layer hands on, to the next one or, from the last, to the epilogue."""
        result: dict[int, list[ir.Value]] = {}
        for position, index in enumerate(self.chosen):
            if position + 1 < len(self.chosen):
                result[index] = self.chain_in[self.chosen[position + 1]]
        last = self.chosen[-1]
        made = {output for node in self.layers[last].nodes for output in node.outputs}
        used = dict.fromkeys(v for node in self.layers[EPILOGUE].nodes for v in node.inputs if v in made)
        used |= dict.fromkeys(v for v in self.traced.graph.outputs if v in made and not self._layer_numbered(v.name))
        result[last] = list(used)
        if len(result[last]) != len(result[self.chosen[0]]):
            raise CannotReplicate("what follows the layers takes other values than the layers pass on")
        outside = [
            value
            for node in self.layers[EPILOGUE].nodes
            for value in node.inputs
            if value is not None
            and value not in made
            and any(value in layer_node.outputs for index in self.chosen for layer_node in self.layers[index].nodes)
        ]
        if outside:
            raise CannotReplicate("what follows the layers takes values of several layers")
        return result

    def _layer_numbered(self, name: str | None) -> bool:
        return re.match(r"^(past_key_values|present)\.\d+\.", name or "") is not None

    def _numbered(self, values: Sequence[ir.Value]) -> list[str]:
        """The names of cache inputs or outputs for every layer, in the order of the traced graph's."""
        names = [value.name or "" for value in values if self._layer_numbered(value.name)]
        parts = dict.fromkeys(tuple(re.split(r"\.\d+\.", name, maxsplit=1)) for name in names)
        return [f"{cache}.{index}.{part}" for index in range(self.stack.depth) for cache, part in parts]

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
