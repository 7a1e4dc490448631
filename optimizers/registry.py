"""Every pass by its name. To add a pass: its file, its test, one line here."""

from __future__ import annotations

from importlib import import_module

from onnxpress.names import unknown_name
from onnxpress.optimizers.base import Pass

PASSES: dict[str, str] = {
    "awq": "onnxpress.optimizers.awq:Awq",
    "clean-up": "onnxpress.optimizers.clean_up:CleanUp",
    "equalize": "onnxpress.optimizers.equalize:Equalize",
    "float16": "onnxpress.optimizers.float16:Float16",
    "fuse-foreign": "onnxpress.optimizers.fuse_foreign:FuseForeign",
    "fuse-gelu": "onnxpress.optimizers.fuse_gelu:FuseGelu",
    "fuse-skip-norm": "onnxpress.optimizers.fuse_skip_norm:FuseSkipNorm",
    "integer-prompts": "onnxpress.optimizers.integer_prompts:IntegerPrompts",
    "keep-blocks": "onnxpress.optimizers.keep_blocks:KeepBlocks",
    "last-logits": "onnxpress.optimizers.last_logits:LastLogits",
    "pack-projections": "onnxpress.optimizers.pack_projections:PackProjections",
    "quantize-blocks": "onnxpress.optimizers.quantize_blocks:QuantizeBlocks",
    "quantize-dynamic": "onnxpress.optimizers.quantize_dynamic:QuantizeDynamic",
    "quantize-static": "onnxpress.optimizers.quantize_static:QuantizeStatic",
    "quantize-embedding": "onnxpress.optimizers.quantize_embedding:QuantizeEmbedding",
    "reduce-heads": "onnxpress.optimizers.reduce_heads:ReduceHeads",
    "rotate": "onnxpress.optimizers.rotate:Rotate",
    "quantize-experts": "onnxpress.optimizers.quantize_experts:QuantizeExperts",
    "smooth": "onnxpress.optimizers.smooth:Smooth",
    "split-outliers": "onnxpress.optimizers.split_outliers:SplitOutliers",
}


def load(name: str) -> type[Pass]:
    """The class of the pass called `name`; raises UsageError with the nearest name."""
    if name not in PASSES:
        raise unknown_name("pass", name, PASSES, see="onnxpress list passes")
    module, _, attribute = PASSES[name].partition(":")
    found: type[Pass] = getattr(import_module(module), attribute)
    assert issubclass(found, Pass)
    assert found.name == name, f"{PASSES[name]} calls itself {found.name!r}, the registry calls it {name!r}"
    return found
