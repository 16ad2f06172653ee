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

from megatron_ds.deepspeed_json.optimizer import OPTIMIZER_KEYS


@dataclass(frozen=True)
class Becomes:
    """``to``: dotted key of EngineConfig. ``when``: in which files; in others the key does nothing.

    ``least``: the smallest legal number.
    """

    to: str
    kind: type
    convert: Callable[[Any], Any] = lambda value: value
    when: Callable[[Mapping[str, Any]], bool] = lambda flat: True
    least: float = 0


@dataclass(frozen=True)
class Noted:
    """``kind`` of its value: bool, or int for a number that is not negative; of a section, those of its keys. None: it
    is read elsewhere."""

    how: str
    kind: type | Mapping[str, type] | None = bool


@dataclass(frozen=True)
class Refused:
    instead: str
    unless: tuple[Any, ...] = (False, None)

    def lets(self, value: Any) -> bool:
        """Whether this value asks for nothing. A section that is not enabled does not, whatever else is in it."""
        off = isinstance(value, Mapping) and value.get("enabled") is False and {"enabled": False} in self.unless
        return off or any(value == other and type(value) is type(other) for other in self.unless)


def stage_of(flat: Mapping[str, Any]) -> int:
    return int(number(flat, "zero_optimization.stage"))


def number(flat: Mapping[str, Any], key: str) -> float:
    """0 for what is no number: that is told where the key's own turn comes."""
    value = flat.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else 0


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


KEYS: Mapping[str, Becomes | Noted | Refused] = {
    "train_batch_size": Becomes("global_batch", int),
    "train_micro_batch_size_per_gpu": Becomes("micro_batch", int),
    "gradient_accumulation_steps": Becomes("accumulation", int),
    "gradient_clipping": Becomes("optimizer.clip_norm", float),
    "steps_per_print": Becomes("log.every", float, lambda steps: 0 if math.isinf(steps) else int(steps)),
    "wall_clock_breakdown": Becomes("log.breakdown", bool),
    "bf16.enabled": Becomes("precision.dtype", bool, lambda on: "bf16" if on else None),
    "bf16.immediate_grad_update": Noted("gradients are accumulated in fp32 as they come"),
    "bf16.check_grad_overflow": Noted("a step with NaN or Inf in its gradients is always skipped"),
    "fp16.enabled": Becomes("precision.dtype", bool, lambda on: "fp16" if on else None),
    "fp16.auto_cast": Becomes("cast_inputs", bool, when=_fp16),
    "fp16.loss_scale": Becomes("precision.loss_scale", float, lambda scale: scale or None, _fp16),
    "fp16.initial_scale_power": Becomes("precision.initial_loss_scale", int, lambda power: 2.0**power, _fp16),
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
    "activation_checkpointing.partition_activations": Refused(_CHECKPOINTING),
    "activation_checkpointing.cpu_checkpointing": Refused(_CHECKPOINTING),
    "activation_checkpointing.contiguous_memory_optimization": Refused(_CHECKPOINTING),
    "activation_checkpointing.number_checkpoints": Refused(_CHECKPOINTING),
    "activation_checkpointing.synchronize_checkpoint_boundary": Refused(_CHECKPOINTING),
    "activation_checkpointing.profile": Refused(_CHECKPOINTING),
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
        "zero.shard_size", int, lambda ranks: ranks if ranks > 1 else None
    ),
    "zero_optimization.mics_shard_size": Becomes(
        "zero.shard_size", int, lambda ranks: ranks if ranks > 1 else None, least=-1
    ),
    "zero_optimization.ignore_unused_parameters": Noted("a parameter that a step did not use has a gradient of zero"),
    "zero_optimization.load_from_fp32_weights": Noted("master weights are what a checkpoint holds"),
    "zero_optimization.elastic_checkpoint": Noted("any checkpoint loads on any number of ranks"),
    "zero_optimization.memory_efficient_linear": Noted("weights are gathered in place, and not kept for the backward"),
    "zero_optimization.zero_quantized_weights": Refused("collectives are not quantised; remove it"),
    "zero_optimization.zero_quantized_gradients": Refused("collectives are not quantised; remove it"),
    "zero_optimization.zero_quantized_nontrainable_weights": Refused("collectives are not quantised; remove it"),
    "zero_optimization.cpu_offload": Refused('use "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_params": Refused('use "offload_param": {"device": "cpu"}'),
    "zero_optimization.legacy_stage1": Refused("there is one stage 1; remove it"),
    "gradient_predivide_factor": Refused("gradients are summed in fp32 and need no division before", (1, 1.0, None)),
    "prescale_gradients": Refused("gradients are summed in fp32 and need no division before"),
    "sparse_gradients": Refused("gradients are dense; use nn.Embedding(sparse=False)"),
    "communication_data_type": Refused("gradients are summed in fp32", ("fp32", None)),
    "data_types.grad_accum_dtype": Refused("gradients are accumulated in fp32", ("fp32", None)),
    "disable_allgather": Refused("remove it"),
    "dump_state": Refused("print engine.config"),
    "memory_breakdown": Refused("print engine.bytes_table()"),
    **{f"bfloat16.{key}": Refused('name the section "bf16"') for key in ("enabled",)},
    "bf16.bf16_master_weights_and_grads": Refused("master weights and gradients are fp32"),
    "bf16.bf16_optimizer_states": Refused("optimizer state is fp32"),
    "seq_parallel_communication_data_type": Refused("remove it", ("fp32", None)),
    "dataloader_drop_last": Refused("give your DataLoader drop_last=True"),
    "comet": Refused(_MONITOR, ({}, {"enabled": False}, None)),
    "eigenvalue": Refused("remove it", ({}, {"enabled": False}, None)),
    "quantize_training": Refused("remove it", ({}, {"enabled": False}, None)),
    "hybrid_engine": Refused("generate with the model that save_pretrained writes", ({}, {"enabled": False}, None)),
    "nebula": Refused("engine.save_checkpoint() writes to any mounted folder", ({}, {"enabled": False}, None)),
    "amp": Refused('use "bf16" or "fp16"', ({}, {"enabled": False}, None)),
    "torch_autocast": Refused("wrap your forward in torch.autocast", ({}, {"enabled": False}, None)),
    "tensor_parallel": Refused("use a model of megatron_ds.models on a mesh with tp", ({}, None)),
    "pipeline": Refused("use examples/pretrain_gpt.py with --mesh.pp", ({}, None)),
    "sparse_attention": Refused("set model.attention.sparse of a model of megatron_ds.models", ({}, None)),
    "checkpoint": Refused(
        "engine.save_checkpoint() writes one format, safely, to a directory all ranks see", ({}, None)
    ),
    "flops_profiler": Refused("use torch.profiler", ({}, {"enabled": False}, None)),
    "comms_logger": Refused("use torch.profiler", ({}, {"enabled": False}, None)),
    "tensorboard": Refused(_MONITOR, ({}, {"enabled": False}, None)),
    "wandb": Refused(_MONITOR, ({}, {"enabled": False}, None)),
    "csv_monitor": Refused(_MONITOR, ({}, {"enabled": False}, None)),
    "autotuning": Refused("choose the stage and the micro-batch yourself", ({}, {"enabled": False}, None)),
    "elasticity": Refused("start any number of ranks: a checkpoint loads on all", ({}, {"enabled": False}, None)),
    "compression_training": Refused("compress with a tool of its own", ({}, None)),
    "curriculum_learning": Refused("order the samples in your own sampler", ({}, {"enabled": False}, None)),
    "data_efficiency": Refused("order the samples in your own sampler", ({}, {"enabled": False}, None)),
    "progressive_layer_drop": Refused("drop layers in the model", ({}, {"enabled": False}, None)),
    **{key: Noted("", None) for key in OPTIMIZER_KEYS},  # read together, by optimizer_of and scheduler_of
}
# Sections of which only known keys may be there; the others above are one value as a whole.
SECTIONS = (
    "bf16",
    "bfloat16",
    "fp16",
    "optimizer",
    "scheduler",
    "activation_checkpointing",
    "zero_optimization",
    "data_types",
)
TOP_LEVEL = tuple(dict.fromkeys(key.split(".")[0] for key in KEYS))
