"""Which layers of a model are the same, so that only one with each signature has to be traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Stack:
    """The repeated blocks of a model."""

    path: str
    """Qualified name of the ModuleList: `model.layers`."""
    signatures: tuple[int, ...]
    """For each layer, the index of the first layer with the same signature."""

    @property
    def depth(self) -> int:
        return len(self.signatures)


def find_stack(model: nn.Module, within: str = "") -> Stack | None:
    """The largest ModuleList (by parameters) with two or more layers of one family below the module named `within`."""
    best: tuple[int, str, nn.ModuleList] | None = None
    taken: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or not path.startswith(within):
            continue
        if any(path.startswith(f"{outer}.") for outer in taken):
            continue
        taken.append(path)
        size = sum(parameter.numel() for parameter in module.parameters())
        if best is None or size > best[0]:
            best = (size, path, module)
    if best is None:
        return None
    _, path, layers = best
    return Stack(path, layer_signatures(layers, model.config))


def layer_signatures(layers: nn.ModuleList, config: Any) -> tuple[int, ...]:
    """For each layer the index of the first layer with the same signature.

    Signatures are equal when structure, parameter shapes and scalar attributes are, and the config says nothing
    different of the layers (any list of the config with one entry per layer, such as `layer_types`).
    """
    per_layer = [
        value
        for _, value in sorted(config.to_dict().items(), key=lambda item: item[0])
        if isinstance(value, (list, tuple)) and len(value) == len(layers)
    ]
    first: dict[Any, int] = {}
    signatures = []
    for index, layer in enumerate(layers):
        signature = (_signature(layer), tuple(repr(value[index]) for value in per_layer))
        signatures.append(first.setdefault(signature, index))
    return tuple(signatures)


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    entries: list[Any] = []
    for path, module in layer.named_modules():
        scalars = tuple(
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, _SCALARS) and name not in {"layer_idx", "layer_id", "layer_number", "training"}
        )
        tensors = tuple(
            (name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        )
        entries.append((path, type(module).__qualname__, scalars, tensors))
    return tuple(entries)


def choose_traced_layers(signatures: tuple[int, ...], extra: int = 0) -> tuple[int, ...]:
    """Layers to trace: the first one (its inputs are the model's edges), then the earliest of each signature after it;
    `extra` more with a signature found after it when one is not enough to tell what flows where."""
    chosen = [0]
    seen: set[int] = set()
    for index in range(1, len(signatures)):
        if signatures[index] not in seen:
            seen.add(signatures[index])
            chosen.append(index)
    for index in range(1, len(signatures)):
        if extra and index not in chosen and signatures[index] in {signatures[c] for c in chosen[1:]}:
            chosen.append(index)
            extra -= 1
    return tuple(sorted(chosen))


def keep_layers(model: nn.Module, stack: Stack, chosen: tuple[int, ...]) -> None:
    """Reduce `model` in place to the chosen layers, its config along with it. Layers keep their `layer_idx`."""
    parent_path, _, name = stack.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    layers = getattr(parent, name)
    setattr(parent, name, nn.ModuleList([layers[index] for index in chosen]))
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        for key in dir(config):
            if key.startswith("_") or key not in vars(config):
                continue
            value = getattr(config, key)
            if isinstance(value, (list, tuple)) and len(value) == stack.depth:
                setattr(config, key, [value[index] for index in chosen])
            elif key in _DEPTH_KEYS and value == stack.depth:
                setattr(config, key, len(chosen))


_DEPTH_KEYS = {"num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"}


def materialise(model: nn.Module) -> None:
    """Give a model on the meta device memory that nothing has touched yet, and recompute the buffers that are not in
    the checkpoint (rotary frequencies, position indices). Parameters stay uninitialised: no page of them becomes
    resident."""
    model.to_empty(device="cpu")
    for module in model.modules():
        computed = module._non_persistent_buffers_set
        if computed:
            with torch.no_grad():
                model._init_weights(module)
    model.tie_weights()
