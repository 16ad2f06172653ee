"""A DeepSpeed JSON as an :class:`~megatron_ds.config.engine.EngineConfig`: every key honoured, noted or refused.

:mod:`megatron_ds.deepspeed_json.keys` says what each key of such a file becomes here.

Numbers may come as floats (``1e9``). ``"auto"`` is looked up in :func:`auto_values`, where the values of Hugging Face's
training arguments are, or refused. Whatever else is wrong is one error with every fault in it.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ds.config.engine import EngineConfig
from megatron_ds.config.read import from_dict
from megatron_ds.deepspeed_json.keys import (
    ALIASES,
    CPU_OFFLOAD,
    KEYS,
    SECTIONS,
    TOP_LEVEL,
    Becomes,
    Noted,
    Refused,
    number,
    offloads,
    stage_of,
)
from megatron_ds.deepspeed_json.optimizer_keys import MOST, optimizer_of, scheduler_of
from megatron_ds.errors import ConfigError, itemised, multiples_around, nearest
from megatron_ds.files import parse_json, read_json


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
    name, values = read_values(source)
    flat = _flatten(values)
    faults: list[str] = []
    flat = _by_own_name(flat, faults)
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
            if not row.lets(value):
                faults.append(f"{key}={value!r} is not supported: {row.instead}")
        elif isinstance(row, Noted):
            _look_at(key, value, row.kind, faults)
            if row.how and not (isinstance(value, Mapping) and value.get("enabled") is False):
                notes.append(f"{key}={value!r}: {row.how}")
        elif value is not None:
            _set(built, key, value, row, flat, faults, notes)
    faults += _contradictions(flat)
    # Where a file is silent they clip; the training arguments, where there are some, know better.
    clip_norm = (auto or {}).get("gradient_clipping", _CLIP_NORM)
    if clip_norm is not None:  # None: the loop clips by itself
        built.setdefault("optimizer", {}).setdefault("clip_norm", clip_norm)
    optimizer_of(flat, built, faults)
    scheduler_of(flat, built, faults, notes)
    if faults:
        raise ConfigError(f"{name}: {itemised(faults)}")
    built.setdefault("zero", {}).setdefault("stage", 0)
    built["decay"] = "all"
    precision = built.get("precision", {})
    if precision.get("dtype") == "fp16" and "loss_scale" not in precision:
        precision["loss_scale_wait"] = 1
    if built.get("log", {}).get("breakdown"):
        built["log"].setdefault("every", _STEPS_PER_PRINT)
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


_CLIP_NORM = 1.0
"""Theirs where a file is silent on gradient_clipping."""
_STEPS_PER_PRINT = 10
"""Where a file asks for a breakdown and not how often to print it."""

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
        elif must_match and value is not None and key in auto and not key.startswith(_ONLY_FILLED):
            said = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            if said != auto[key]:
                faults.append(f"{key}={value!r}, but the training arguments say {auto[key]!r}; use 'auto' for it")


_AUTO_KEYS = frozenset(
    auto_values(
        hidden_size=1, micro_batch=1, accumulation=1, dp=1, lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0,
        clip_norm=0.0, fp16=False, bf16=False, warmup_steps=1, total_steps=1,
    )
)  # fmt: skip


def read_values(source: Mapping[str, Any] | str | Path) -> tuple[str, Mapping[str, Any]]:
    """A name for messages, and the values: of a dictionary, a JSON file, or JSON text in URL-safe base 64."""
    if isinstance(source, Mapping):
        return "DeepSpeed configuration", source

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{source}: {', '.join(map(repr, twice))} stands there twice; keep one")
        return dict(pairs)

    text = None if os.path.isfile(source) else _decoded(str(source))
    try:
        values = read_json(source, pairs=once) if text is None else parse_json(text, once)
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds {type(values).__name__}, not an object of settings")
    return str(source), values


def _decoded(source: str) -> str | None:
    """The JSON object that ``source`` is in base 64; None: it is none."""
    try:
        text = base64.urlsafe_b64decode(source).decode()
    except ValueError:
        return None
    return text if text.lstrip().startswith("{") else None


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


def _by_own_name(flat: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """Aliases become the key's own name; switches of older files the setting that they stand for."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        if key == "zero_optimization" and isinstance(value, bool):  # as the first files had it
            key, value = "zero_optimization.stage", int(value)
        section, _, rest = key.partition(".")
        own = ALIASES.get(key, f"{ALIASES[section]}.{rest}" if section in ALIASES and rest else key)
        if own in found or (own != key and own in flat):
            faults.append(f"{key} and {own} are two names of one key; keep one")
        found[own] = value
    for switch, device in CPU_OFFLOAD.items():
        if switch in found and _look(switch, found[switch], faults) and found.setdefault(device, "cpu") == "none":
            faults.append(f"{switch}=True and {device}='none' contradict one another; keep one")
        found.pop(switch, None)
    return found


def _look(key: str, value: Any, faults: list[str]) -> bool:
    return value is not None and _take(key, value, bool, 0, faults) is True


def coerce(value: Any, kind: type) -> Any:
    """``value`` as a bool, int, float or str; integral floats are ints. ValueError says what is wrong."""
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise ValueError("true or false" if kind is bool else "a number" if kind in (int, float) else "a string")
    if kind in (int, float) and isinstance(value, int | float):
        if isinstance(value, int) and abs(value) > MOST:
            raise ValueError("at most 2^63 in size")
        if kind is int and not (math.isfinite(value) and value == int(value)):
            raise ValueError("a whole number")
        if math.isnan(value):
            raise ValueError("a number")
        return kind(value)
    if kind is str and isinstance(value, str):
        return value
    raise ValueError({int: "a whole number", float: "a number", str: "a string"}[kind])


def _look_at(key: str, value: Any, kind: type | Mapping[str, type] | None, faults: list[str]) -> None:
    """A value that changes nothing has to be one that DeepSpeed would take all the same."""
    if value is None or kind in (None, object):
        return
    if isinstance(kind, type):
        _take(key, value, kind, 0, faults)
    elif not isinstance(value, Mapping):
        faults.append(f"{key}={value!r} must be an object of settings")
    else:
        for name, member in value.items():
            if name in kind:
                _look_at(f"{key}.{name}", member, kind[name], faults)
            else:
                faults.append(f"unknown key {f'{key}.{name}'!r}{nearest(name, kind)}")


def _take(key: str, value: Any, kind: type, least: float, faults: list[str]) -> Any:
    """The value, of its kind and not below ``least``; None with a fault where it is not."""
    try:
        value = coerce(value, kind)
    except ValueError as error:
        faults.append(f"{key}={value!r} must be {error}")
        return None
    if kind in (int, float) and value < least:
        remedy = "is negative; use 0 for none, or leave it out" if least < 1 else f"is less than {least}; leave it out"
        faults.append(f"{key}={value!r} {remedy}")
        return None
    return value


def _set(
    built: dict[str, Any],
    key: str,
    value: Any,
    row: Becomes,
    flat: Mapping[str, Any],
    faults: list[str],
    notes: list[str],
) -> None:
    value = _take(key, value, row.kind, row.least, faults)
    if value is None:
        return
    if not row.when(flat):
        notes.append(f"{key}={value!r}: not in use with the rest of this file")
        return
    value = row.convert(value)
    if value is None:
        return
    if row.remark:
        notes.append(f"{key}={value!r}: {row.remark}")
    *path, last = row.to.split(".")
    place = built
    for part in path:
        place = place.setdefault(part, {})
    place[last] = value


def _contradictions(flat: Mapping[str, Any]) -> list[str]:
    """What the file says against itself, whatever the number of ranks."""
    found = []
    stage, zero = stage_of(flat), "zero_optimization"
    if flat.get("fp16.enabled") is True and flat.get("bf16.enabled") is True:
        found.append("fp16.enabled and bf16.enabled are both true; switch one of them off")
    if offloads("offload_param", "cpu", "nvme")(flat) and stage < 3:
        device = flat[f"{zero}.offload_param.device"]
        found.append(
            f"{zero}.offload_param.device={device!r} with {zero}.stage={stage}: parameters are sharded, and can leave "
            f"the device, at stage 3 only; use stage 3, or {zero}.offload_optimizer"
        )
    if offloads("offload_optimizer", "cpu", "nvme")(flat) and stage == 0:
        found.append(f"{zero}.offload_optimizer with {zero}.stage=0; use stage 1, 2 or 3")
    for part in ("offload_optimizer", "offload_param"):
        if offloads(part, "nvme")(flat) and not flat.get(f"{zero}.{part}.nvme_path"):
            found.append(f"{zero}.{part}.device='nvme' needs {zero}.{part}.nvme_path, a folder on a local disk")
    whole, micro, steps = (
        number(flat, k) for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if min(whole, micro, steps) > 0 and whole % (micro * steps):
        found.append(
            f"train_batch_size={whole} is no multiple of train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={steps}, for any number of ranks; use "
            f"{multiples_around(int(whole), int(micro * steps))}"
        )
    return found
