"""The ``optimizer`` and ``scheduler`` sections of a DeepSpeed JSON, whose keys depend on their ``type``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ds.errors import nearest

MOST = 1 << 63
"""Of a whole number in a file, which may have thousands of digits."""

_PARAMS = (
    "lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode", "momentum", "bias_correction", "amsgrad",
    "dampening", "nesterov", "alpha", "centered", "lr_decay", "initial_accumulator_value", "momentum_decay", "rho",
)  # fmt: skip
_SCHEDULER = {
    "WarmupLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type"),
    "WarmupDecayLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "total_num_steps"),
    "WarmupCosineLR": ("warmup_min_ratio", "cos_min_ratio", "warmup_num_steps", "warmup_type", "total_num_steps"),
    "OneCycle": (
        "cycle_min_lr", "cycle_max_lr", "decay_lr_rate", "cycle_first_step_size", "cycle_second_step_size",
        "cycle_first_stair_count", "cycle_second_stair_count", "decay_step_size", "cycle_momentum", "cycle_min_mom",
        "cycle_max_mom", "decay_mom_rate",
    ),
    "LRRangeTest": (
        "lr_range_test_min_lr", "lr_range_test_step_size", "lr_range_test_step_rate", "lr_range_test_staircase",
    ),
}  # fmt: skip
_FROM_ZERO = ("cycle_second_step_size", "cycle_first_stair_count", "cycle_second_stair_count", "decay_step_size")
_TOTAL = {"total_num_steps": ", the updates of the run"}
_NEEDED: dict[str, dict[str, str]] = {
    "WarmupDecayLR": _TOTAL,
    "WarmupCosineLR": _TOTAL,
    "OneCycle": {"cycle_min_lr": "", "cycle_max_lr": ""},
}
OPTIMIZER_KEYS = (
    "optimizer.type",
    *(f"optimizer.params.{name}" for name in _PARAMS),
    "scheduler.type",
    *dict.fromkeys(f"scheduler.params.{name}" for names in _SCHEDULER.values() for name in names),
)
# What each of torch.optim's elementwise classes takes of the above.
_TORCH = {
    "Adam": ("lr", "betas", "eps", "weight_decay", "amsgrad"),
    "AdamW": ("lr", "betas", "eps", "weight_decay", "amsgrad"),
    "SGD": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
    "Adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
    "Adamax": ("lr", "betas", "eps", "weight_decay"),
    "NAdam": ("lr", "betas", "eps", "weight_decay", "momentum_decay"),
    "RAdam": ("lr", "betas", "eps", "weight_decay"),
    "Adadelta": ("lr", "rho", "eps", "weight_decay"),
}
_WHOLE = "is not made from a file"
_COMPRESSED = "sends compressed gradients, and here they are summed in fp32; DeepSpeed 0.19.8 has removed it too"
_WIDTHS = "scales rates by widths that the package mup has noted on the model; give initialize() one of mup.optim"
_OTHERS = {
    **dict.fromkeys(("Lamb", "FusedLamb", "Muon", "Adafactor"), _WHOLE),
    **dict.fromkeys(("OneBitAdam", "ZeroOneAdam", "OneBitLamb"), _COMPRESSED),
    **dict.fromkeys(("MuAdam", "MuAdamW", "MuSGD"), _WIDTHS),
    "LBFGS": "evaluates the loss again and again",
    "SparseAdam": "takes sparse gradients, and here they are dense",
    "Lion": "is not in torch.optim",
}


def _section(flat: Mapping[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    prefix = f"{name}.params."
    params = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
    return flat.get(f"{name}.type"), {key: value for key, value in params.items() if value is not None}


def optimizer_of(flat: Mapping[str, Any], built: dict[str, Any], faults: list[str]) -> None:
    """Our own AdamW where it has the same update; else torch's class of that name, with the file's arguments."""
    kind, params = _section(flat, "optimizer")
    if kind is None:
        if params:
            faults.append(f"optimizer.params {sorted(params)} without optimizer.type; use AdamW, for one")
        return
    name = next((known for known in _TORCH if str(kind).lower() == known.lower()), None)
    if name is None:
        why = next((reason for other, reason in _OTHERS.items() if str(kind).lower() == other.lower()), None)
        faults.append(
            f"optimizer.type={kind!r} {why or 'is unknown' + nearest(str(kind), _TORCH)}; use one of "
            f"{', '.join(_TORCH)}, or give initialize() the optimizer itself"
        )
        return
    # Which of two implementations of the same update; their defaults differ.
    of_torch = params.pop("torch_adam", False) is True
    decoupled = params.pop("adam_w_mode", True) or name == "AdamW"
    if params.pop("bias_correction", True) is not True:
        faults.append(
            "optimizer.params.bias_correction=false is not supported, and without it the update is another; give "
            "initialize() optimizer=megatron_ds.integrations.deepspeed.ops.adam.FusedAdam(..., bias_correction=False)"
        )
    if name == "Adam" and decoupled:
        name = "AdamW"  # there "Adam" decays as AdamW does, unless told otherwise
    unknown = [key for key in params if key not in _TORCH[name]]
    if unknown:
        faults.append(
            f"optimizer.params.{unknown[0]}: {name} has no such argument{nearest(unknown[0], _TORCH[name])}; it takes "
            f"{', '.join(_TORCH[name])}"
        )
        return
    section = built.setdefault("optimizer", {})
    # Where the file is silent, the defaults of the class that would be used there hold and not ours.
    if name == "AdamW":
        params.setdefault("weight_decay", 0.01 if of_torch else 0.0)
    if name != "AdamW" or params.get("amsgrad"):
        built["torch_optimizer"] = {"name": name, "params": params}
        return
    betas = params.get("betas", (0.9, 0.999))
    if not (isinstance(betas, list | tuple) and len(betas) == 2):
        faults.append(f"optimizer.params.betas={betas!r} must be two numbers")
        return
    section.update(name="adamw", lr=params.get("lr", 1e-3), beta1=betas[0], beta2=betas[1], eps=params.get("eps", 1e-8))
    section["weight_decay"] = params["weight_decay"]


def scheduler_of(flat: Mapping[str, Any], built: dict[str, Any], faults: list[str], notes: list[str]) -> None:
    kind, params = _section(flat, "scheduler")
    if kind is None:
        if params:
            faults.append(
                f"scheduler.params {sorted(params)} without scheduler.type; use one of {', '.join(_SCHEDULER)}"
            )
        return
    if not isinstance(kind, str) or kind not in _SCHEDULER:
        faults.append(
            f"scheduler.type={kind!r} is not supported{nearest(str(kind), _SCHEDULER)}; use one of "
            f"{', '.join(_SCHEDULER)}, or give initialize() a torch scheduler"
        )
        return
    values: dict[str, Any] = {"name": kind}
    for key, value in params.items():
        if key not in _SCHEDULER[kind]:
            # People keep one file and change the type.
            notes.append(f"scheduler.params.{key}={value!r}: {kind} does not use it")
            continue
        if key.endswith(("_steps", "_step_size", "_count")):
            least = 0 if key in _FROM_ZERO else 1
            whole = isinstance(value, int | float) and abs(value) <= MOST and value == int(value) and value >= least
            if not whole or isinstance(value, bool):
                faults.append(f"scheduler.params.{key}={value!r} must be a whole number{' above 0' if least else ''}")
                continue
            value = int(value)
        values[key] = value
    for key in _NEEDED.get(kind, ()):
        if key not in params:
            faults.append(f"scheduler.type={kind!r} needs scheduler.params.{key}{_NEEDED[kind][key]}")
    total, warmup = values.get("total_num_steps"), values.get("warmup_num_steps", 1000)
    if total is not None and total < warmup:
        faults.append(f"scheduler.params.total_num_steps={total} is less than warmup_num_steps={warmup}")
    built["schedule"] = values
