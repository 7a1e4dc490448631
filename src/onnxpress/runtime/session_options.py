"""Options of an onnxruntime session, checked: the runtime itself accepts any unknown key in silence.

Two kinds live in one mapping, as in profiles: configuration entries of onnxruntime's header
(`onnxruntime_session_options_config_keys.h`, dotted names) and the attributes of `SessionOptions` below.

onnxruntime's defaults are the best found for the CPU. Peak RSS of a 4-bit SmolLM2-135M (182 MB, 113 of them an fp32
head, logits of all 512 positions): 520 MB; 407 with `session.disable_prepacking`, which makes 4-bit kernels five times
slower; 550 with `enable_cpu_mem_arena` off; 516 to 520 with memory patterns, spinning, or graph optimizations changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import onnxruntime

from onnxpress.errors import UsageError

CONFIG_KEYS = frozenset(
    """
    ep.context_embed_mode ep.context_enable ep.context_file_path ep.context_model_external_initializers_file_name
    ep.context_node_name_prefix ep.dynamic.qnn_htp_performance_mode ep.dynamic.workload_type
    ep.enable_weightless_ep_context_nodes ep.share_ep_contexts ep.stop_share_ep_contexts
    memory.enable_memory_arena_shrinkage
    mlas.disable_kleidiai mlas.enable_gemm_fastmath_arm64_bfloat16 mlas.qnbit.force_fp32 mlas.use_lut_gemm
    optimization.constant_folding_max_output_size_in_bytes optimization.disable_specified_optimizers
    optimization.enable_cast_chain_elimination optimization.enable_gelu_approximation
    optimization.memory_optimizer_config optimization.memory_optimizer_probe_config
    optimization.minimal_build_optimizations
    session.allow_released_opsets_only session.collect_node_memory_stats_to_file session.debug_layout_transformation
    session.disable_aot_function_inlining session.disable_cpu_ep_fallback session.disable_double_qdq_remover
    session.disable_model_compile session.disable_prepacking session.disable_qdq_constant_folding
    session.disable_quant_qdq session.dynamic_block_base session.enable_dq_matmulnbits_fusion
    session.enable_gelu_approximation session.enable_quant_qdq session.enable_quant_qdq_cleanup
    session.force_spinning_stop session.graph_optimizations_loop_level
    session.inter_op.allow_spinning session.intra_op.allow_spinning session.inter_op.spin_backoff_max
    session.intra_op.spin_backoff_max session.inter_op.spin_duration_us session.intra_op.spin_duration_us
    session.intra_op_thread_affinities session.load_model_format
    session.model_external_initializers_file_folder_path session.node_partition_config_file
    session.optimized_model_external_initializers_file_name
    session.optimized_model_external_initializers_min_size_in_bytes session.qdq_matmulnbits_accuracy_level
    session.qdq_matmulnbits_block_size session.qdqisint8allowed session.record_ep_graph_assignment_info
    session.save_external_prepacked_constant_initializers session.save_model_format session.set_denormal_as_zero
    session.strict_shape_type_inference session.use_device_allocator_for_initializers session.use_env_allocators
    session.use_memory_mapped_ort_model session.use_ort_model_bytes_directly
    session.use_ort_model_bytes_for_initializers session.x64quantprecision
""".split()
)

_LEVELS = onnxruntime.GraphOptimizationLevel
OPTIMIZATION_LEVELS = {
    "disable": _LEVELS.ORT_DISABLE_ALL,
    "basic": _LEVELS.ORT_ENABLE_BASIC,
    "extended": _LEVELS.ORT_ENABLE_EXTENDED,
    "layout": _LEVELS.ORT_ENABLE_LAYOUT,
    "all": _LEVELS.ORT_ENABLE_ALL,
}
SWITCHES = ("enable_cpu_mem_arena", "enable_mem_pattern", "enable_mem_reuse")
NUMBERS = ("intra_op_num_threads", "inter_op_num_threads", "log_severity_level")
ATTRIBUTES = frozenset(("graph_optimization_level", *SWITCHES, *NUMBERS))


def check_session_options(options: Mapping[str, str]) -> None:
    """Raise UsageError for a key or a value that onnxruntime would ignore."""
    for key, value in options.items():
        if key not in CONFIG_KEYS and key not in ATTRIBUTES:
            near = difflib.get_close_matches(key, CONFIG_KEYS | ATTRIBUTES, n=1)
            raise UsageError(f"unknown session option {key!r}", hint=f"did you mean {near[0]!r}?" if near else None)
        if key == "graph_optimization_level" and value not in OPTIMIZATION_LEVELS:
            raise UsageError(f"{key} is {value!r}", hint=f"one of {', '.join(OPTIMIZATION_LEVELS)}")
        if key in SWITCHES and str(value) not in ("0", "1"):
            raise UsageError(f"session option {key} is {value!r}", hint='"0" or "1"')
        if key in NUMBERS and not str(value).isdigit():
            raise UsageError(f"session option {key} is {value!r}", hint="a whole number")


def make_session_options(
    options: Mapping[str, str] | None = None, threads: int | None = None, profile_prefix: str | None = None
) -> onnxruntime.SessionOptions:
    """`SessionOptions` from checked `options`; `threads` (None or 0: one per physical core) wins over the mapping."""
    options = options or {}
    check_session_options(options)
    result = onnxruntime.SessionOptions()
    result.log_severity_level = 3
    for key, value in options.items():
        if key == "graph_optimization_level":
            result.graph_optimization_level = OPTIMIZATION_LEVELS[value]
        elif key in SWITCHES:
            setattr(result, key, str(value) == "1")
        elif key in NUMBERS:
            setattr(result, key, int(value))
        else:
            result.add_session_config_entry(key, str(value))
    if threads:
        result.intra_op_num_threads = threads
    if profile_prefix:
        result.enable_profiling = True
        result.profile_file_prefix = profile_prefix
    return result
