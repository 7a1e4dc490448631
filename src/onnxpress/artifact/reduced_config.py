"""config.json after the structure of a graph was changed, and what of that structure no configuration can say.

Every family has names of its own for the same sizes; the tables below are all that is known of them. Where a name is
missing, or layers differ from each other, the artifact is for ONNX only, and says why.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxpress.artifact.structure import Structure

NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "width": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "ffn_hidden_size"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"),
    "vocabulary": ("vocab_size",),
}
"""What families call each size: those of a configuration that hold the value that the graph had."""
SIDES: Mapping[str, tuple[str, ...]] = {
    "layers": ("{side}_layers", "num_{side}_layers"),
    "heads": ("{side}_attention_heads",),
    "width": ("{side}_ffn_dim",),
}
"""Names of a size of the encoder or the decoder alone; these come first."""
TITLES: Mapping[str, str] = {
    "layers": "layers",
    "heads": "attention heads",
    "kv_heads": "key and value heads",
    "head_dim": "features of a head",
    "width": "feed-forward width",
    "hidden": "hidden size",
    "vocabulary": "vocabulary",
}
DIFFER = "layers differ in"
"""What a reason begins with that the next change may make out of date."""
_GROUPED = frozenset(
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 olmo olmo2 granite "
    "starcoder2 smollm3 cohere glm helium".split()
)
UNWRITTEN: Mapping[str, Mapping[str, str]] = {
    "head_dim": dict.fromkeys(_GROUPED, "head_dim"),
    "kv_heads": dict.fromkeys(_GROUPED | {"stablelm"}, "num_key_value_heads"),
    "width": {"gpt2": "n_inner", "falcon": "ffn_hidden_size"},
}
"""Names that model types understand even where their config.json leaves them out (transformers 5.23)."""
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
"""Lists with an entry for each layer."""
BY_POSITION: Mapping[str, str] = {
    "gemma2": "layer_types",
    "gemma3_text": "layer_types",
    "modernbert": "layer_types",
    "smollm3": "no_rope_layers",
}
"""Model types whose layers take turns, and the list that says so where it is written out."""
BIASES: Mapping[str, Mapping[str, str]] = {
    "llama": {"self_attn": "attention_bias", "mlp": "mlp_bias"},
    "granite": {"self_attn": "attention_bias", "mlp": "mlp_bias"},
    "smollm3": {"self_attn": "attention_bias", "mlp": "mlp_bias"},
    "helium": {"self_attn": "attention_bias", "mlp": "mlp_bias"},
    "qwen3": {"self_attn": "attention_bias"},
    "olmo": {"self_attn": "attention_bias"},
    "olmo2": {"self_attn": "attention_bias"},
    "gemma": {"self_attn": "attention_bias"},
    "gemma2": {"self_attn": "attention_bias"},
    "gemma3_text": {"self_attn": "attention_bias"},
}
"""Names that give all products of a module a bias; those that have none in the graph get zeros."""
SECTIONS: Mapping[str, str] = {"text_model": "text_config", "vision_model": "vision_config"}


@dataclass
class Reduced:
    """A configuration, and why it is not the whole truth."""

    config: dict[str, Any]
    onnx_only: list[str] = field(default_factory=list)


def reduced_config(config: Mapping[str, Any], before: Structure, after: Structure) -> Reduced:
    """Change a copy of `config`, which describes `before`, to describe `after`; all else is left as it is.

    Reasons say which layers, what was found, and which name is missing.
    """
    result = Reduced(copy.deepcopy(dict(config)))
    if not config:
        return result
    sections: dict[str, list[str]] = {}
    for stack in after.stacks:
        sections.setdefault(_section(config, stack), []).append(stack)
    for name, stacks in sections.items():
        part = result.config[name] if name else result.config
        _follow(part, stacks, before, after, result.onnx_only)
    _vocabulary(result.config, sections, before, after, result.onnx_only)
    if after.norms != before.norms:
        kinds = (" and ".join(sorted(one.norms)) for one in (before, after))
        result.onnx_only.append("{} has {} where the graph has {}".format(config.get("model_type"), *kinds))
    _added(result.config, sorted(after.names - before.names), result.onnx_only)
    if before.tied and not after.tied:
        result.config["tie_word_embeddings"] = False
    return result


def renewed(earlier: Iterable[str], later: Iterable[str]) -> list[str]:
    """Join the reasons of two changes in a row, each once: how layers differ by now replaces how they did before."""
    later = list(later)
    subjects = {_differing(reason) for reason in later} - {None}
    return list(dict.fromkeys([*(reason for reason in earlier if _differing(reason) not in subjects), *later]))


def _differing(reason: str) -> str | None:
    """Return what a reason says that layers differ in, if it does."""
    subject = reason.partition(":")[0]
    return subject if subject.startswith(DIFFER) else None


def _added(config: dict[str, Any], names: Sequence[str], reasons: list[str]) -> None:
    """Say which biases and matrices were added. Names of layers that were numbered again are no new ones."""
    known = BIASES.get(str(config.get("model_type")), {})
    homeless = []
    for name in names:
        flags = [flag for module, flag in known.items() if module in name.split(".")]
        if name.endswith(".bias") and flags:
            config[flags[0]] = True
        else:
            homeless.append(name)
    if homeless:
        more = f", … ({len(homeless)} in all)" if len(homeless) > 2 else ""
        reasons.append(
            f"weights were added that {config.get('model_type')} has no place for: {', '.join(homeless[:2])}{more}"
        )


def _section(config: Mapping[str, Any], stack: str) -> str:
    found = [part for word, part in SECTIONS.items() if word in stack.split(".") and isinstance(config.get(part), dict)]
    return found[0] if found else ""


def _follow(
    config: dict[str, Any], stacks: Sequence[str], before: Structure, after: Structure, reasons: list[str]
) -> None:
    """Change what `config` says of these stacks."""
    old, new = _Sizes(before), _Sizes(after)
    for stack in stacks:
        _layers(config, stack, before, after, reasons)
    for size in ("heads", "kv_heads", "width", "hidden"):
        named: dict[tuple[str, ...], list[str]] = {}
        for stack in stacks:
            named.setdefault(_names(config, size, stack, old.values(size, [stack])), []).append(stack)
        for names, group in named.items():
            values, were = new.values(size, group), old.values(size, group)
            if values == were:
                continue
            if len(values) != 1:
                reasons.append(f"{DIFFER} {TITLES[size]}: {_list(values)}")
            elif size == "kv_heads" and values == new.values("heads", group) and not names:
                continue  # as many as there are queries, which is what a configuration without a name means
            elif not names:
                reasons.append(f"{config.get('model_type')} has no name for {TITLES[size]}, now {_list(values)}")
            else:
                config.update(dict.fromkeys(names, *values))
    dims, was = new.values("head_dim", stacks), old.values("head_dim", stacks)
    if any(new.values(size, stacks) != old.values(size, stacks) for size in ("heads", "head_dim", "hidden")):
        if len(dims) == 1:
            _head_dim(config, next(iter(dims)), stacks[0], reasons)
        elif dims:
            reasons.append(f"{DIFFER} {TITLES['head_dim']}: {_list(dims)}")
    if after.frequencies and (after.frequencies != before.frequencies or dims != was) and len(dims) == 1:
        _rotary(config, before, after, next(iter(dims)), reasons)


@dataclass(frozen=True)
class _Sizes:
    """The values that a size has in the layers of some stacks."""

    structure: Structure

    def values(self, size: str, stacks: Sequence[str]) -> set[int]:
        """Collect the values of a size in the layers of these stacks."""
        sizes: set[int | None] = set()
        for stack in stacks:
            layers = self.structure.stacks.get(stack, ())
            if size == "hidden":
                sizes.add(self.structure.hidden.get(stack))
            elif size == "width":
                sizes |= {layer.width for layer in layers}
            else:
                sizes |= {getattr(heads, size) for layer in layers for heads in layer.attentions}
        return {one for one in sizes if one is not None}


def _names(config: Mapping[str, Any], size: str, stack: str, values: Collection[int]) -> tuple[str, ...]:
    """List what `config` calls a size of a stack, which has `values` before the change; empty if nothing.

    Some configurations have names beside their own that nothing reads; those with the same value follow.
    """
    side = next((word for word in ("encoder", "decoder") if word in stack.split(".")), "")
    sided = [name.format(side=side) for name in SIDES.get(size, ()) if side]
    for names in (sided, NAMES[size]):
        known = [name for name in names if name in config]
        if known:
            return tuple(name for name in known if config[name] in values) or (known[0],)
    unwritten = UNWRITTEN.get(size, {}).get(str(config.get("model_type")))
    return (unwritten,) if unwritten is not None else ()


def _vocabulary(
    config: dict[str, Any], sections: Iterable[str], before: Structure, after: Structure, reasons: list[str]
) -> None:
    """Change the size of the vocabulary wherever it is named; whoever numbers tokens anew may have written it."""
    if after.vocabulary == before.vocabulary:
        return
    parts = [config, *(config[section] for section in sections if section)]
    (name,) = NAMES["vocabulary"]
    named = [part for part in parts if part.get(name) == before.vocabulary]
    if not named and not any(part.get(name) == after.vocabulary for part in parts):
        reasons.append(f"{config.get('model_type')} has no name for {TITLES['vocabulary']}, now {after.vocabulary}")
    for part in named:
        part[name] = after.vocabulary


def _layers(config: dict[str, Any], stack: str, before: Structure, after: Structure, reasons: list[str]) -> None:
    """Change the number of layers, and lists with an entry for each."""
    kept = [layer.origin for layer in after.stacks[stack]]
    known = [layer.origin for layer in before.stacks.get(stack, ())]
    if kept == known:
        return
    names = _names(config, "layers", stack, {len(known)})
    if not names:
        reasons.append(f"{config.get('model_type')} has no name for the layers of {stack}, now {len(kept)}")
        return
    config.update(dict.fromkeys(names, len(kept)))
    lists = BY_POSITION.get(str(config.get("model_type")))
    if lists is not None and not isinstance(config.get(lists), list):
        reasons.append(f"layers of {config['model_type']} take turns, and config.json has no {lists} to say which stay")
    for key in PER_LAYER:
        values = config.get(key)
        if isinstance(values, list) and len(values) == len(known):
            config[key] = [values[known.index(index)] for index in kept if index in known]


def _head_dim(config: dict[str, Any], head_dim: int, stack: str, reasons: list[str]) -> None:
    """Write it wherever hidden size / heads is not it."""
    heads, hidden = (config.get(next(iter(_names(config, size, stack, ())), "")) for size in ("heads", "hidden"))
    names = _names(config, "head_dim", stack, ())
    if names and config.get(names[0]) is not None:
        config[names[0]] = head_dim
    elif heads and hidden and hidden == heads * head_dim:
        return
    elif (unwritten := UNWRITTEN["head_dim"].get(str(config.get("model_type")))) is not None:
        config[unwritten] = head_dim
    else:
        reasons.append(
            f"{config.get('model_type')} takes hidden size / heads for the features of a head: {hidden} / {heads} "
            f"is not {head_dim}"
        )


def _rotary(config: dict[str, Any], before: Structure, after: Structure, head_dim: int, reasons: list[str]) -> None:
    """Frequencies of RoPE, θ^(-j / planes): fewer planes need another θ, or have none."""
    if len(after.frequencies) > 1:
        reasons.append(f"{len(after.frequencies)} tables of rotations, and the planes or the size of heads changed")
        return
    (frequencies,) = after.frequencies
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if frequencies not in before.frequencies:
        place = rope if "rope_theta" in rope else config
        theta = _theta(frequencies, float(place.get("rope_theta") or 10000.0), before)
        if kind != "default":
            reasons.append(f"planes of RoPE were dropped, and its {kind!r} scaling follows from all of them")
        elif theta is None:
            reasons.append("planes of RoPE were dropped, and those that are left are no series of one rope_theta")
        elif theta != place.get("rope_theta", 10000.0):
            place["rope_theta"] = theta
    share = 2 * len(frequencies) / head_dim
    places = [(part, key) for part in (rope, config) for key in ("partial_rotary_factor", "rotary_pct") if key in part]
    if places:
        for part, key in places:
            part[key] = share
    elif share != 1:
        reasons.append(f"{2 * len(frequencies)} of {head_dim} features are rotated, and config.json has no name for it")


def _theta(frequencies: Sequence[float], theta: float, before: Structure) -> float | None:
    """The base whose series these are, exactly where it is a power of the old one; None if there is no such base."""
    planes = len(frequencies)
    if not math.isclose(frequencies[0], 1.0, rel_tol=1e-5) or min(frequencies) <= 0:
        return None
    if planes == 1:
        return theta
    powers = [theta, *(theta ** (planes / len(old)) for old in before.frequencies)]
    for base in (*powers, frequencies[-1] ** (-planes / (planes - 1))):
        if all(math.isclose(one, base ** (-j / planes), rel_tol=2e-5) for j, one in enumerate(frequencies)):
            return float(base)
    return None


def _list(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)))
