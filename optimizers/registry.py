"""Every pass by its name. To add a pass: its file, its test, one line here."""

from __future__ import annotations

from importlib import import_module

from onnxpress.errors import unknown_name
from onnxpress.optimizers.base import Pass

PASSES: dict[str, str] = {
    "awq": "onnxpress.optimizers.quantization.awq:Awq",
    "clean-up": "onnxpress.optimizers.fusion.clean_up:CleanUp",
    "compute-rotary": "onnxpress.optimizers.fusion.compute_rotary:ComputeRotary",
    "equalize": "onnxpress.optimizers.quantization.equalize:Equalize",
    "float16": "onnxpress.optimizers.quantization.float16:Float16",
    "fuse-foreign": "onnxpress.optimizers.fusion.fuse_foreign:FuseForeign",
    "fuse-gelu": "onnxpress.optimizers.fusion.fuse_gelu:FuseGelu",
    "fuse-skip-norm": "onnxpress.optimizers.fusion.fuse_skip_norm:FuseSkipNorm",
    "integer-prompts": "onnxpress.optimizers.quantization.integer_prompts:IntegerPrompts",
    "keep-blocks": "onnxpress.optimizers.quantization.keep_blocks:KeepBlocks",
    "last-logits": "onnxpress.optimizers.fusion.last_logits:LastLogits",
    "low-rank": "onnxpress.optimizers.pruning.low_rank:LowRank",
    "pack-projections": "onnxpress.optimizers.fusion.pack_projections:PackProjections",
    "prune-ffn": "onnxpress.optimizers.pruning.prune_ffn:PruneFfn",
    "prune-weights": "onnxpress.optimizers.pruning.prune_weights:PruneWeights",
    "quantize-blocks": "onnxpress.optimizers.quantization.quantize_blocks:QuantizeBlocks",
    "quantize-dynamic": "onnxpress.optimizers.quantization.quantize_dynamic:QuantizeDynamic",
    "quantize-embedding": "onnxpress.optimizers.quantization.quantize_embedding:QuantizeEmbedding",
    "quantize-experts": "onnxpress.optimizers.quantization.quantize_experts:QuantizeExperts",
    "quantize-static": "onnxpress.optimizers.quantization.quantize_static:QuantizeStatic",
    "reduce-depth": "onnxpress.optimizers.depth.reduce_depth:ReduceDepth",
    "reduce-heads": "onnxpress.optimizers.heads.reduce_heads:ReduceHeads",
    "reduce-hidden": "onnxpress.optimizers.pruning.reduce_hidden:ReduceHidden",
    "repair": "onnxpress.optimizers.pruning.repair:Repair",
    "rotate": "onnxpress.optimizers.quantization.rotate:Rotate",
    "smooth": "onnxpress.optimizers.quantization.smooth:Smooth",
    "split-outliers": "onnxpress.optimizers.quantization.split_outliers:SplitOutliers",
    "trim-vocabulary": "onnxpress.optimizers.pruning.trim_vocabulary:TrimVocabulary",
}


def pass_class(name: str) -> type[Pass]:
    """The class of the pass called `name`; raises UsageError with the nearest name."""
    if name not in PASSES:
        raise unknown_name("pass", name, PASSES, see="onnxpress list passes")
    module, _, attribute = PASSES[name].partition(":")
    cls: type[Pass] = getattr(import_module(module), attribute)
    assert issubclass(cls, Pass)
    assert cls.name == name, f"{PASSES[name]} calls itself {cls.name!r}, the registry calls it {name!r}"
    return cls
