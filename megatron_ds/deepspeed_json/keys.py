"""What each key of a DeepSpeed JSON becomes here: :data:`KEYS`, by dotted name. A key is

- :class:`Becomes` another setting, with the same meaning;
- :class:`Noted`: it tunes how something is done that is done in another way here, so that no value of it changes a
  result. The note says in what way, and is shown once;
- :class:`Refused`, with what to do instead, unless its value asks for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ds.deepspeed_json.optimizer_keys import MOST, OPTIMIZER_KEYS


@dataclass(frozen=True)
class Becomes:
    """``to``: dotted key of EngineConfig. ``when``: in which files; in others the key does nothing.

    ``least``: the smallest legal number. ``remark``: a note where the key does something.
    """

    to: str
    kind: type
    convert: Callable[[Any], Any] = lambda value: value
    when: Callable[[Mapping[str, Any]], bool] = lambda flat: True
    least: float = 0
    remark: str = ""


@dataclass(frozen=True)
class Noted:
    """``kind`` of its value: bool, or int or float for a number that is not negative; of a section, those of its keys.
    object: any. None: it is read elsewhere."""

    how: str
    kind: type | Mapping[str, type] | None = bool


@dataclass(frozen=True)
class Refused:
    instead: str
    unless: tuple[Any, ...] = (False, None)

    def lets(self, value: Any) -> bool:
        """Whether this value asks for nothing. A section that is not enabled, or does not say so, does not."""
        off = isinstance(value, Mapping) and value.get("enabled", False) is False and {"enabled": False} in self.unless
        return off or any(value == other and type(value) is type(other) for other in self.unless)


def stage_of(flat: Mapping[str, Any]) -> int:
    return int(number(flat, "zero_optimization.stage"))


def number(flat: Mapping[str, Any], key: str) -> float:
    """0 for what is no number: that is told where the key's own turn comes."""
    value = flat.get(key)
    return value if isinstance(value, int | float) and abs(value) <= MOST else 0


def _at_stage_3(flat: Mapping[str, Any]) -> bool:
    return stage_of(flat) == 3


def _fp16(flat: Mapping[str, Any]) -> bool:
    return flat.get("fp16.enabled") is True


def offloads(part: str, *devices: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda flat: flat.get(f"zero_optimization.{part}.device", "none") in devices


def _megabytes(elements: int) -> float:
    """Elements to MB of gradients, which are accumulated in fp32."""
    return max(elements * 4 / 1e6, 1e-6)


_BUCKETS = "parameters and gradients move in the same buckets; their size is reduce_bucket_size"
_SWAP = "swap files are read and written by a few threads with buffers of their own"
_AIO_NUMBERS = ("block_size", "queue_depth", "thread_count", "intra_op_parallelism")
_AIO_SWITCHES = ("single_submit", "overlap_events", "use_gds")
_CHECKPOINTING = (
    "it only configures deepspeed.checkpointing; call model.gradient_checkpointing_enable() on a transformers model, "
    "or torch.utils.checkpoint in your own"
)
_MONITOR = "log from your own loop with what engine.step() returns"


def _offload(part: str, to: str) -> dict[str, Becomes | Noted | Refused]:
    key = f"zero_optimization.{part}"
    return {
        f"{key}.device": Becomes(f"{to}.device", str),
        f"{key}.nvme_path": Becomes(f"{to}.path", str, when=offloads(part, "nvme")),
        f"{key}.pin_memory": Becomes(f"{to}.pin_memory", bool, when=offloads(part, "cpu", "nvme")),
        f"{key}.buffer_count": Noted(_SWAP, int),
        f"{key}.buffer_size": Noted(_SWAP, int),
        f"{key}.fast_init": Noted("swap files are written once in any case"),
        f"{key}.pipeline": Noted("transfers always overlap with the update"),
        f"{key}.pipeline_read": Noted("transfers always overlap with the update"),
        f"{key}.pipeline_write": Noted("transfers always overlap with the update"),
        f"{key}.max_in_cpu": Noted("zero.host_memory_mb bounds host memory", int),
    }


_REMOVED = "DeepSpeed 0.19.8 has removed it; "
_UNREAD = "DeepSpeed itself reads no such key"
_COMPILE_NUMBERS = ("free_activation_threshold",)
_COMPILE_SWITCHES = (
    "autoep_non_moe", "free_activation", "offload_activation", "offload_activation_pin_memory", "offload_opt_states",
    "double_buffer", "symmetric_memory", "debug_log", "offload_parameters", "sync_before_reduce", "sync_after_reduce",
    "sync_before_allgather", "sync_after_allgather", "keep_int_input_tensors", "keep_all_input_tensors",
)  # fmt: skip
_PROFILER: Mapping[str, type] = {
    "enabled": bool, "recompute_fwd_factor": float, "profile_step": int, "module_depth": object, "top_modules": int,
    "detailed": bool, "output_file": object,
}  # fmt: skip
_COMMS: Mapping[str, type] = {"enabled": bool, "verbose": bool, "prof_all": bool, "debug": bool, "prof_ops": object}
_PIPELINE: Mapping[str, type] = {
    "stages": object, "partition": object, "seed_layers": bool, "activation_checkpoint_interval": int,
    "pipe_partitioned": bool, "grad_partitioned": bool, "use_reentrant": bool,
}  # fmt: skip
_TENSOR_PARALLEL = (
    "dtype", "tp_overlap_comm", "vocab_parallel_lm_head", "vocab_parallel_ce_backend", "tp", "tensor_parallel",
    "injection_policy_tuple", "partition_config", "preset_model", "keep_module_on_host", "kernel_inject",
)  # fmt: skip
_OFF: tuple[Any, ...] = ({}, {"enabled": False}, None)

KEYS: Mapping[str, Becomes | Noted | Refused] = {
    "train_batch_size": Becomes("global_batch", int, least=1),
    "train_micro_batch_size_per_gpu": Becomes("micro_batch", int, least=1),
    "gradient_accumulation_steps": Becomes("accumulation", int, least=1),
    "gradient_clipping": Becomes("optimizer.clip_norm", float),
    "steps_per_print": Becomes("log.every", float, lambda steps: 0 if math.isinf(steps) else int(steps)),
    "wall_clock_breakdown": Becomes("log.breakdown", bool),
    "bf16.enabled": Becomes("precision.dtype", bool, lambda on: "bf16" if on else None),
    "bf16.immediate_grad_update": Noted("gradients are accumulated in fp32 as they come"),
    "bf16.check_grad_overflow": Noted("a step with NaN or Inf in its gradients is always skipped"),
    "fp16.enabled": Becomes("precision.dtype", bool, lambda on: "fp16" if on else None),
    "fp16.auto_cast": Becomes("cast_inputs", bool, when=_fp16),
    "fp16.loss_scale": Becomes("precision.loss_scale", float, lambda scale: scale or None, _fp16),
    "fp16.initial_scale_power": Becomes(
        "precision.initial_loss_scale", int, lambda power: 2.0 ** min(power, 1000), _fp16
    ),
    "fp16.loss_scale_window": Becomes("precision.loss_scale_window", int, when=_fp16),
    "fp16.hysteresis": Becomes("precision.loss_scale_hysteresis", int, when=_fp16),
    "fp16.min_loss_scale": Becomes("precision.min_loss_scale", float, when=_fp16),
    "fp16.consecutive_hysteresis": Refused("an overflow's tolerance comes back when the scale doubles, not before"),
    "fp16.fp16_master_weights_and_grads": Refused("master weights and gradients are fp32"),
    "zero_allow_untested_optimizer": Noted(
        "every optimizer is tried on the spot, and refused if it cannot update shards"
    ),
    "zero_force_ds_cpu_optimizer": Noted("torch's own fused optimizers run on any device"),
    "aio": Noted(_SWAP, {**dict.fromkeys(_AIO_NUMBERS, int), **dict.fromkeys(_AIO_SWITCHES, bool)}),
    "activation_checkpointing.partition_activations": Noted(_CHECKPOINTING),
    "activation_checkpointing.cpu_checkpointing": Noted(_CHECKPOINTING),
    "activation_checkpointing.contiguous_memory_optimization": Noted(_CHECKPOINTING),
    "activation_checkpointing.number_checkpoints": Noted(_CHECKPOINTING, int),
    "activation_checkpointing.synchronize_checkpoint_boundary": Noted(_CHECKPOINTING),
    "activation_checkpointing.profile": Noted(_CHECKPOINTING),
    "zero_optimization.stage": Becomes("zero.stage", int),
    **_offload("offload_optimizer", "zero.offload_optimizer"),
    "zero_optimization.offload_optimizer.ratio": Becomes(
        "zero.offload_optimizer.ratio", float, when=offloads("offload_optimizer", "cpu", "nvme")
    ),
    **_offload("offload_param", "zero.offload_parameters"),
    "zero_optimization.overlap_comm": Becomes("zero.overlap", bool),
    "zero_optimization.contiguous_gradients": Noted("gradients are always written into contiguous buckets"),
    "zero_optimization.reduce_scatter": Noted("gradients are reduced to the rank that keeps them"),
    "zero_optimization.reduce_bucket_size": Becomes("zero.bucket_mb", int, _megabytes),
    "zero_optimization.allgather_partitions": Noted("each bucket's parameters are gathered in one collective"),
    "zero_optimization.allgather_bucket_size": Noted(_BUCKETS, int),
    "zero_optimization.sub_group_size": Noted(
        "the update goes bucket by bucket; their size is reduce_bucket_size", int
    ),
    "zero_optimization.round_robin_gradients": Noted("each bucket is cut over all ranks, so none has more work"),
    "zero_optimization.stage3_prefetch_bucket_size": Becomes(
        "zero.prefetch", int, lambda elements: int(elements > 0), _at_stage_3
    ),
    "zero_optimization.stage3_param_persistence_threshold": Becomes(
        "zero.persistence_threshold", int, when=_at_stage_3
    ),
    "zero_optimization.stage3_max_live_parameters": Noted(
        "the unit in use and those prefetched are whole, no more", int
    ),
    "zero_optimization.stage3_max_reuse_distance": Noted("a unit is freed when its module is done", int),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": Noted("save_pretrained always writes whole weights"),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": Noted("save_pretrained always writes whole weights"),
    "zero_optimization.stage3_model_persistence_threshold": Noted(
        "every parameter under stage3_param_persistence_threshold stays whole", int
    ),
    "zero_optimization.stage3_module_granularity_threshold": Noted(
        "members of lists of modules are gathered as one", int
    ),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": Noted("parameters come by all-gather"),
    "zero_optimization.log_trace_cache_warnings": Noted("there is no trace that could be wrong"),
    "zero_optimization.zero_hpz_partition_size": Becomes(
        "zero.secondary_size", int, lambda ranks: ranks if ranks > 1 else None
    ),
    "zero_optimization.zero_quantized_weights": Becomes(
        "zero.quantized_weights", bool, lambda on: "int8" if on else None
    ),
    "zero_optimization.zero_quantized_gradients": Becomes(
        "zero.quantized_gradients", bool, lambda on: "int4" if on else None
    ),
    "zero_optimization.mics_shard_size": Becomes(
        "zero.shard_size",
        int,
        lambda ranks: ranks if ranks > 1 else None,
        least=-1,
        remark=_REMOVED + "shards of a node are zero.shard_size here",
    ),
    "zero_optimization.mics_hierarchical_params_gather": Refused(_REMOVED + "remove it"),
    "zero_optimization.zeropp_loco_param": Refused(_REMOVED + "remove it", ({}, None)),
    "zero_optimization.zenflow": Refused("every update is a whole one; remove it", ({}, None)),
    "zero_optimization.offload_optimizer.super_offload": Refused("use pin_memory and ratio of the same section"),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": Noted("a rank's update uses its torch threads", float),
    "zero_optimization.cpu_offload_use_pin_memory": Noted("pin_memory of offload_optimizer says so"),
    "zero_optimization.use_multi_rank_bucket_allreduce": Noted("each bucket is reduced to all its ranks at once"),
    "zero_optimization.compute_grad_norm": Noted("the norm is always computed, as a step with NaN is skipped by it"),
    "zero_optimization.stage3_allgather_sequential": Noted("parameters come by one all-gather a bucket"),
    "zero_optimization.parameter_alignment": Noted("every parameter begins at an aligned address"),
    "zero_optimization.pipeline_loading_checkpoint": Noted("a checkpoint is read tensor by tensor"),
    "zero_optimization.override_module_apply": Noted("module.apply() is the model's own"),
    "zero_optimization.enable_sanity_checks": Noted("the checks are always made"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": Noted("where state is kept is offload_optimizer's"),
    **{
        f"zero_optimization.leaf_module.{key}": Noted("what a module's forward touches is gathered for it", object)
        for key in ("classes", "names", "name_suffixes")
    },
    "zero_optimization.ignore_unused_parameters": Noted("a parameter that a step did not use has a gradient of zero"),
    "zero_optimization.load_from_fp32_weights": Noted("master weights are what a checkpoint holds"),
    "zero_optimization.elastic_checkpoint": Noted("any checkpoint loads on any number of ranks"),
    "zero_optimization.memory_efficient_linear": Noted("weights are gathered in place, and not kept for the backward"),
    "zero_optimization.zero_quantized_nontrainable_weights": Refused(
        "weights are gathered alike, frozen or not; use zero_quantized_weights"
    ),
    "zero_optimization.legacy_stage1": Refused("there is one stage 1; remove it"),
    "gradient_predivide_factor": Noted("gradients are summed in fp32 and need no division before", float),
    "prescale_gradients": Noted("gradients are summed in fp32 and need no division before"),
    "sparse_gradients": Refused(_REMOVED + "gradients are dense; use nn.Embedding(sparse=False)"),
    "gradient_allreduce_op": Refused("gradients are averaged over the ranks; multiply the loss", ("mean", None)),
    "managed_gradient_accumulation": Refused("use engine.set_gradient_accumulation_boundary()", (True, None)),
    "disable_python_gc": Noted("Python's garbage collector is left alone"),
    "use_data_before_expert_parallelism": Noted("there are no experts over ranks here"),
    "vocabulary_size": Noted("DeepSpeed only warns of sizes that are no multiple of 8", int),
    "log_level": Noted("set the level of the logger 'megatron_ds'", object),
    "timers": Noted("see wall_clock_breakdown", object),
    "weight_quantization": Refused("weights are not quantised; remove it", ({}, None)),
    "expert_parallel": Refused("experts are the model's own; remove it", _OFF),
    "datastates_ckpt": Refused("engine.save_checkpoint() writes one format", _OFF),
    "data_parallel_size": Refused("all ranks are data-parallel; remove it", (None,)),
    "sequence_parallel_size": Refused("use a model of megatron_ds.models; remove it", (1, None)),
    "compile.deepcompile": Refused("call engine.compile()"),
    "compile.passes": Refused("call engine.compile()", (None, [])),
    **{f"compile.{key}": Noted("it is of deepcompile alone") for key in _COMPILE_SWITCHES},
    **{f"compile.{key}": Noted("it is of deepcompile alone", int) for key in _COMPILE_NUMBERS},
    "_comment": Noted("a comment", object),
    "comms_config": Noted(_UNREAD, object),
    "monitor_config": Noted(_UNREAD + "; its sections stand at the top", object),
    "fp16.opt_level": Noted("it was of apex's amp", object),
    "optimizer.legacy_fusion": Noted("torch's own fused optimizers run on any device"),
    "communication_data_type": Refused("gradients are summed in fp32", ("fp32", None)),
    "data_types.param_dtype": Refused("use bf16 or fp16", (None,)),
    "data_types.buffer_dtype": Refused("buffers keep their dtype", (None,)),
    "data_types.keep_in_fp32_modules": Refused("buffers keep their dtype", (None, [])),
    "data_types.grad_accum_dtype": Refused("gradients are accumulated in fp32", ("fp32", None)),
    "disable_allgather": Noted("each bucket's parameters are gathered in one collective"),
    "dump_state": Refused("print engine.config"),
    "memory_breakdown": Refused("print engine.bytes_table()"),
    "bf16.bf16_master_weights_and_grads": Refused("master weights and gradients are fp32"),
    "bf16.bf16_optimizer_states": Refused("optimizer state is fp32"),
    "seq_parallel_communication_data_type": Refused("remove it", ("fp32", None)),
    "dataloader_drop_last": Noted("the loader of deepspeed.initialize(training_data=) does so; another has drop_last"),
    "comet": Refused(_MONITOR, _OFF),
    "eigenvalue": Refused(_REMOVED + "remove it", _OFF),
    "quantize_training": Refused(_REMOVED + "remove it", _OFF),
    "hybrid_engine": Refused("generate with the model that save_pretrained writes", _OFF),
    "nebula": Refused(_REMOVED + "engine.save_checkpoint() writes to any mounted folder", _OFF),
    "graph_harvesting": Refused(_REMOVED + "call engine.compile()"),
    "amp": Refused(_REMOVED + 'use "bf16" or "fp16"', _OFF),
    "torch_autocast": Refused("wrap your forward in torch.autocast", _OFF),
    "tensor_parallel.autotp_size": Refused("use a model of megatron_ds.models on a mesh with tp", (0, 1, None)),
    **{f"tensor_parallel.{key}": Noted("it is of autotp_size alone", object) for key in _TENSOR_PARALLEL},
    "pipeline": Noted("PipelineModule's own arguments say so", _PIPELINE),
    "sparse_attention": Refused(_REMOVED + "set model.attention.sparse of a model of megatron_ds.models", ({}, None)),
    "checkpoint.tag_validation": Noted("ranks that save different tags are always told", object),
    "checkpoint.checkpoint_serialization": Noted("tensors are written by several threads, with checksums"),
    "checkpoint.parallel_write": Noted("every rank writes its part", {"pipeline_stage": bool}),
    "checkpoint.load_universal": Refused(
        "any checkpoint loads on any number of ranks; tools/zero_to_fp32.py reads the weights of DeepSpeed's own"
    ),
    "checkpoint.use_node_local_storage": Refused("engine.save_checkpoint() writes to a directory that all ranks see"),
    "checkpoint.writer": Refused("engine.save_checkpoint() writes one format, safely", ({}, None)),
    "flops_profiler": Noted("use torch.profiler", _PROFILER),
    "comms_logger": Noted("use torch.profiler", _COMMS),
    "tensorboard": Refused(_MONITOR, _OFF),
    "wandb": Refused(_MONITOR, _OFF),
    "csv_monitor": Refused(_MONITOR, _OFF),
    "autotuning": Refused("choose the stage and the micro-batch yourself", _OFF),
    "elasticity": Refused(_REMOVED + "start any number of ranks: a checkpoint loads on all", _OFF),
    "compression_training": Refused(_REMOVED + "compress with a tool of its own", ({}, None)),
    "curriculum_learning": Refused(_REMOVED + "order the samples in your own sampler", _OFF),
    "data_efficiency": Refused("order the samples in your own sampler", _OFF),
    "progressive_layer_drop": Refused(_REMOVED + "drop layers in the model", _OFF),
    **{key: Noted("", None) for key in OPTIMIZER_KEYS},  # read together, by optimizer_of and scheduler_of
}
# Sections of which only known keys may be there; the others above are one value as a whole.
SECTIONS = (
    "bf16",
    "bfloat16",
    "checkpoint",
    "compile",
    "fp16",
    "optimizer",
    "scheduler",
    "activation_checkpointing",
    "zero_optimization",
    "data_types",
    "tensor_parallel",
)
# Other names that DeepSpeed takes: of the key, or of the section before a dot.
ALIASES: Mapping[str, str] = {
    "bfloat16": "bf16",
    "zero_optimization.prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.model_persistence_threshold": "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.max_live_parameters": "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.max_reuse_distance": "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.gather_16bit_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
    "zero_optimization.module_granularity_threshold": "zero_optimization.stage3_module_granularity_threshold",
    "zero_optimization.use_all_reduce_for_fetch_params": "zero_optimization.stage3_use_all_reduce_for_fetch_params",
    "zero_optimization.allgather_sequential": "zero_optimization.stage3_allgather_sequential",
}
# Switches of older files: true is the other section's device "cpu".
CPU_OFFLOAD: Mapping[str, str] = {
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer.device",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param.device",
}
TOP_LEVEL = tuple(dict.fromkeys(key.split(".")[0] for key in (*KEYS, *ALIASES)))
