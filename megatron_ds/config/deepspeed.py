"""A DeepSpeed JSON as an :class:`~megatron_ds.config.engine.EngineConfig`: every key honoured, noted or refused.

:data:`KEYS` is the whole of it: what each key of such a file becomes here. A key is

- :class:`Becomes` another setting, with the same meaning;
- :class:`Noted`: it tunes how something is done that is done in another way here, so that no value of it changes a
  result. The note says in what way, and is shown once;
- :class:`Refused`, with what to do instead, unless its value asks for nothing.

Numbers may come as floats (``1e9``). ``"auto"`` is looked up in :func:`auto_values`, where the values of Hugging Face's
training arguments are, or refused. Whatever else is wrong is one error with every fault in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ds.config.deepspeed_optimizer import OPTIMIZER_KEYS, optimizer_of, scheduler_of
from megatron_ds.config.engine import EngineConfig
from megatron_ds.config.read import from_dict
from megatron_ds.errors import ConfigError, nearest


@dataclass(frozen=True)
class Becomes:
    """``to``: dotted key of EngineConfig. ``when``: in which files; in others the key does nothing."""

    to: str
    kind: type
    convert: Callable[[Any], Any] = lambda value: value
    when: Callable[[Mapping[str, Any]], bool] = lambda flat: True


@dataclass(frozen=True)
class Noted:
    how: str
    kinds: tuple[type, ...] = (bool, int, float, str, dict, list, type(None))


@dataclass(frozen=True)
class Refused:
    instead: str
    unless: tuple[Any, ...] = (False, None)


def _stage(flat: Mapping[str, Any]) -> int:
    value = flat.get("zero_optimization.stage", 0)
    return int(value) if isinstance(value, int | float) else 0


def _at_stage_3(flat: Mapping[str, Any]) -> bool:
    return _stage(flat) == 3


def _fp16(flat: Mapping[str, Any]) -> bool:
    return flat.get("fp16.enabled") is True


def _offloads(part: str, *devices: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda flat: flat.get(f"zero_optimization.{part}.device", "none") in devices


def _megabytes(elements: int) -> float:
    """Elements to MB of gradients, which are accumulated in fp32."""
    return max(elements * 4 / 1e6, 1e-6)


_BUCKETS = "parameters and gradients move in the same buckets; their size is reduce_bucket_size"
_SWAP = "swap files are read and written by a few threads with buffers of their own"
_CHECKPOINTING = (
    "it only configures deepspeed.checkpointing; call model.gradient_checkpointing_enable() on a transformers model, "
    "or torch.utils.checkpoint in your own"
)
_MONITOR = "log from your own loop with what engine.step() returns"


def _offload(part: str, to: str) -> dict[str, Becomes | Noted | Refused]:
    key = f"zero_optimization.{part}"
    return {
        f"{key}.device": Becomes(f"{to}.device", str),
        f"{key}.nvme_path": Becomes(f"{to}.path", str, when=_offloads(part, "nvme")),
        f"{key}.pin_memory": Becomes(f"{to}.pin_memory", bool, when=_offloads(part, "cpu", "nvme")),
        f"{key}.buffer_count": Noted(_SWAP),
        f"{key}.buffer_size": Noted(_SWAP),
        f"{key}.fast_init": Noted("swap files are written once in any case"),
        f"{key}.pipeline": Noted("transfers always overlap with the update"),
        f"{key}.pipeline_read": Noted("transfers always overlap with the update"),
        f"{key}.pipeline_write": Noted("transfers always overlap with the update"),
        f"{key}.max_in_cpu": Noted("zero.host_memory_mb bounds host memory"),
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
        "every optimizer is tried on the spot, and refused if it is not elementwise"
    ),
    "zero_force_ds_cpu_optimizer": Noted("torch's own fused optimizers run on any device"),
    "aio": Noted(_SWAP),
    "activation_checkpointing.partition_activations": Refused(_CHECKPOINTING),
    "activation_checkpointing.cpu_checkpointing": Refused(_CHECKPOINTING),
    "activation_checkpointing.contiguous_memory_optimization": Refused(_CHECKPOINTING),
    "activation_checkpointing.number_checkpoints": Refused(_CHECKPOINTING),
    "activation_checkpointing.synchronize_checkpoint_boundary": Refused(_CHECKPOINTING),
    "activation_checkpointing.profile": Refused(_CHECKPOINTING),
    "zero_optimization.stage": Becomes("zero.stage", int),
    **_offload("offload_optimizer", "zero.offload_optimizer"),
    "zero_optimization.offload_optimizer.ratio": Becomes(
        "zero.offload_optimizer.ratio", float, when=_offloads("offload_optimizer", "cpu", "nvme")
    ),
    **_offload("offload_param", "zero.offload_parameters"),
    "zero_optimization.overlap_comm": Becomes("zero.overlap", bool),
    "zero_optimization.contiguous_gradients": Noted("gradients are always written into contiguous buckets"),
    "zero_optimization.reduce_scatter": Noted("gradients are reduced to the rank that keeps them"),
    "zero_optimization.reduce_bucket_size": Becomes("zero.bucket_mb", int, _megabytes),
    "zero_optimization.allgather_partitions": Noted("each bucket's parameters are gathered in one collective"),
    "zero_optimization.allgather_bucket_size": Noted(_BUCKETS),
    "zero_optimization.sub_group_size": Noted("the update goes bucket by bucket; their size is reduce_bucket_size"),
    "zero_optimization.round_robin_gradients": Noted("each bucket is cut over all ranks, so none has more work"),
    "zero_optimization.stage3_prefetch_bucket_size": Becomes(
        "zero.prefetch", int, lambda elements: int(elements > 0), _at_stage_3
    ),
    "zero_optimization.stage3_param_persistence_threshold": Becomes(
        "zero.persistence_threshold", int, when=_at_stage_3
    ),
    "zero_optimization.stage3_max_live_parameters": Noted("the unit in use and those prefetched are whole, no more"),
    "zero_optimization.stage3_max_reuse_distance": Noted("a unit is freed when its module is done"),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": Noted("save_pretrained always writes whole weights"),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": Noted("save_pretrained always writes whole weights"),
    "zero_optimization.zero_hpz_partition_size": Becomes(
        "zero.shard_size", int, lambda ranks: ranks if ranks > 1 else None
    ),
    "zero_optimization.mics_shard_size": Becomes("zero.shard_size", int, lambda ranks: ranks if ranks > 1 else None),
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
    **{key: Noted("") for key in OPTIMIZER_KEYS},  # read together, by optimizer_of and scheduler_of
}
# Sections of which only known keys may be there; the others above are one value as a whole.
SECTIONS = ("bf16", "fp16", "optimizer", "scheduler", "activation_checkpointing", "zero_optimization", "data_types")
TOP_LEVEL = tuple(dict.fromkeys(key.split(".")[0] for key in KEYS))


def from_deepspeed(
    source: Mapping[str, Any] | str | Path, auto: Mapping[str, Any] | None = None, must_match: bool = False
) -> tuple[EngineConfig, list[str]]:
    """The configuration that a DeepSpeed dictionary or file means, and notes on keys that have no counterpart.

    Args:
        auto: dotted key to the value that ``"auto"`` stands for; see :func:`auto_values`.
        must_match: what the file says in place of ``"auto"`` has to be what ``auto`` says.

    Raises:
        ConfigError: with every fault that was found.
    """
    name, values = _read(source)
    flat = _flatten(values)
    faults: list[str] = []
    for key in flat:
        if key not in KEYS:
            faults.append(f"unknown key {key!r}{nearest(key, KEYS)}")
    flat = {key: value for key, value in flat.items() if key in KEYS}
    _resolve(flat, auto or {}, must_match, faults)
    built: dict[str, Any] = {}
    notes: list[str] = []
    for key, value in flat.items():
        row = KEYS[key]
        if isinstance(row, Refused):
            if value not in row.unless:
                faults.append(f"{key}={value!r} is not supported: {row.instead}")
        elif isinstance(row, Noted):
            if row.how:
                notes.append(f"{key}={value!r}: {row.how}")
        elif value is not None:
            _set(built, key, value, row, flat, faults, notes)
    faults += _contradictions(flat)
    optimizer_of(flat, built, faults)
    scheduler_of(flat, built, faults, notes)
    if faults:
        raise ConfigError(f"{name}: " + (faults[0] if len(faults) == 1 else "".join(f"\n  - {f}" for f in faults)))
    built.setdefault("zero", {}).setdefault("stage", 0)
    built["decay"] = "all"
    return from_dict(EngineConfig, built, name), notes


def is_deepspeed(values: Mapping[str, Any]) -> bool:
    """Whether a dictionary is a DeepSpeed one and not ours. Raises ConfigError where it is half of each."""
    ours = [key for key in values if key in EngineConfig.model_fields and key != "optimizer"]
    theirs = [key for key in values if key in TOP_LEVEL and key not in EngineConfig.model_fields]
    optimizer = values.get("optimizer")
    if isinstance(optimizer, Mapping) and "type" in optimizer:
        theirs.append("optimizer.type")
    if ours and theirs:
        raise ConfigError(
            f"{', '.join(theirs)} are DeepSpeed's keys, {', '.join(ours)} are ours; use one kind in a config"
        )
    return bool(theirs)


def auto_values(
    *,
    hidden_size: int | None = None,
    micro_batch: int | None = None,
    accumulation: int | None = None,
    dp: int | None = None,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    clip_norm: float | None = None,
    fp16: bool | None = None,
    bf16: bool | None = None,
    warmup_steps: int | None = None,
    total_steps: int | None = None,
) -> dict[str, Any]:
    """What ``"auto"`` stands for, by dotted key, as Hugging Face's Trainer fills it in. None: not known."""
    whole = None if None in (micro_batch, accumulation, dp) else (micro_batch or 0) * (accumulation or 0) * (dp or 0)
    zero = "zero_optimization"
    values = {
        "train_batch_size": whole,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "optimizer.params.lr": lr,
        "optimizer.params.betas": None if betas is None else list(betas),
        "optimizer.params.eps": eps,
        "optimizer.params.weight_decay": weight_decay,
        "scheduler.params.warmup_min_lr": 0.0,
        "scheduler.params.warmup_max_lr": lr,
        "scheduler.params.warmup_num_steps": None if warmup_steps is None else max(1, warmup_steps),
        "scheduler.params.total_num_steps": total_steps,
        "fp16.enabled": fp16,
        "bf16.enabled": bf16,
        f"{zero}.reduce_bucket_size": None if hidden_size is None else hidden_size**2,
        f"{zero}.stage3_prefetch_bucket_size": None if hidden_size is None else int(0.9 * hidden_size**2),
        f"{zero}.stage3_param_persistence_threshold": None if hidden_size is None else 10 * hidden_size,
    }
    return {key: value for key, value in values.items() if value is not None}


# Filled in, but never compared: no training argument says them.
_ONLY_FILLED = ("scheduler.params.warmup_min_lr", "zero_optimization.")


def _resolve(flat: dict[str, Any], auto: Mapping[str, Any], must_match: bool, faults: list[str]) -> None:
    for key, value in list(flat.items()):
        if value == "auto":
            if key in auto:
                flat[key] = auto[key]
                continue
            del flat[key]
            needs = "hidden_size" if key.startswith("zero_optimization") else "the training arguments"
            faults.append(
                f"{key}='auto' stands for nothing here: "
                + (f"give a value, or {needs} to auto_values()" if key in _AUTO_KEYS else "give a value, or remove it")
            )
        elif must_match and key in auto and not key.startswith(_ONLY_FILLED):
            said = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            if said != auto[key]:
                faults.append(f"{key}={value!r}, but the training arguments say {auto[key]!r}; use 'auto' for it")


_AUTO_KEYS = frozenset(
    auto_values(
        hidden_size=1, micro_batch=1, accumulation=1, dp=1, lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0,
        clip_norm=0.0, fp16=False, bf16=False, warmup_steps=1, total_steps=1,
    )
)  # fmt: skip


def _read(source: Mapping[str, Any] | str | Path) -> tuple[str, Mapping[str, Any]]:
    if isinstance(source, Mapping):
        return "DeepSpeed configuration", source

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{source}: {', '.join(map(repr, twice))} stands there twice; keep one")
        return dict(pairs)

    try:
        values = json.loads(Path(source).read_text(), object_pairs_hook=once)
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds {type(values).__name__}, not an object of settings")
    return str(source), values


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        deeper = key.split(".")[0] in SECTIONS and key not in KEYS
        if isinstance(value, Mapping) and (deeper or any(known.startswith(key + ".") for known in KEYS)):
            flat.update(_flatten(value, key + "."))
        elif not (value is None and any(known.startswith(key + ".") for known in KEYS)):
            flat[key] = value
    return flat


def coerce(value: Any, kind: type) -> Any:
    """``value`` as a bool, int, float or str; integral floats are ints. ValueError says what is wrong."""
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise ValueError("true or false" if kind is bool else "a number" if kind in (int, float) else "a string")
    if kind in (int, float) and isinstance(value, int | float):
        if kind is int and value != int(value):
            raise ValueError("a whole number")
        return kind(value)
    if kind is str and isinstance(value, str):
        return value
    raise ValueError({int: "a whole number", float: "a number", str: "a string"}[kind])


def _set(
    built: dict[str, Any],
    key: str,
    value: Any,
    row: Becomes,
    flat: Mapping[str, Any],
    faults: list[str],
    notes: list[str],
) -> None:
    try:
        value = coerce(value, row.kind)
    except ValueError as error:
        faults.append(f"{key}={value!r} must be {error}")
        return
    if not row.when(flat):
        notes.append(f"{key}={value!r}: not in use with the rest of this file")
        return
    if row.kind in (int, float) and value < 0:
        faults.append(f"{key}={value!r} is negative; use 0 for none, or leave it out")
        return
    value = row.convert(value)
    if value is None:
        return
    *path, last = row.to.split(".")
    place = built
    for part in path:
        place = place.setdefault(part, {})
    place[last] = value


def _contradictions(flat: Mapping[str, Any]) -> list[str]:
    """What the file says against itself, whatever the number of ranks."""
    found = []
    stage, zero = _stage(flat), "zero_optimization"
    if flat.get("fp16.enabled") is True and flat.get("bf16.enabled") is True:
        found.append("fp16.enabled and bf16.enabled are both true; switch one of them off")
    if _offloads("offload_param", "cpu", "nvme")(flat) and stage < 3:
        device = flat[f"{zero}.offload_param.device"]
        found.append(
            f"{zero}.offload_param.device={device!r} with {zero}.stage={stage}: parameters are sharded, and can leave "
            f"the device, at stage 3 only; use stage 3, or {zero}.offload_optimizer"
        )
    if _offloads("offload_optimizer", "cpu", "nvme")(flat) and stage == 0:
        found.append(f"{zero}.offload_optimizer with {zero}.stage=0; use stage 1, 2 or 3")
    for part in ("offload_optimizer", "offload_param"):
        if _offloads(part, "nvme")(flat) and not flat.get(f"{zero}.{part}.nvme_path"):
            found.append(f"{zero}.{part}.device='nvme' needs {zero}.{part}.nvme_path, a folder on a local disk")
    whole, micro, steps = (
        flat.get(k) for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if all(isinstance(n, int | float) and n > 0 for n in (whole, micro, steps)) and whole % (micro * steps):  # type: ignore[operator]
        below = int(whole // (micro * steps) * micro * steps)  # type: ignore[operator]
        found.append(
            f"train_batch_size={whole} is no multiple of train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={steps}, for any number of ranks; use "
            f"{f'{below} or ' if below else ''}{below + int(micro * steps)}"  # type: ignore[operator]
        )
    if flat.get(f"{zero}.zero_hpz_partition_size", 1) > 1 and flat.get(f"{zero}.mics_shard_size", -1) > 1:
        found.append(
            f"{zero}.zero_hpz_partition_size and {zero}.mics_shard_size both set the ranks of a shard; use one"
        )
    return found
