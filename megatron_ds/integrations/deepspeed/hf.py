"""What scripts for transformers ask of a DeepSpeed configuration before the model is built."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from megatron_ds.deepspeed_json import read_values


class HfDeepSpeedConfig:
    """Answers to dotted keys of a DeepSpeed configuration.

    While an object of it lives, :func:`is_deepspeed_zero3_enabled` speaks of it. That is DeepSpeed's own convention:
    scripts keep the object in a variable that they never read.
    """

    _alive: ClassVar[weakref.ref[HfDeepSpeedConfig] | None] = None

    def __init__(self, config_file_or_dict: Mapping[str, Any] | str | Path):
        _, values = read_values(config_file_or_dict)
        self.config = dict(values)
        HfDeepSpeedConfig._alive = weakref.ref(self)

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        found: Any = self.config
        for part in ds_key_long.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    def is_true(self, ds_key_long: str) -> bool:
        return bool(self.get_value(ds_key_long))

    def is_false(self, ds_key_long: str) -> bool:
        value = self.get_value(ds_key_long)
        return value is not None and not value

    def is_zero2(self) -> bool:
        return self.get_value("zero_optimization.stage") == 2

    def is_zero3(self) -> bool:
        return self.get_value("zero_optimization.stage") == 3

    def is_offload(self) -> bool:
        parts = ("offload_param", "offload_optimizer")
        return any(self.get_value(f"zero_optimization.{part}.device") in ("cpu", "nvme") for part in parts)


def is_deepspeed_zero3_enabled() -> bool:
    """Whether a living :class:`HfDeepSpeedConfig` is of stage 3."""
    newest = HfDeepSpeedConfig._alive
    config = newest() if newest is not None else None
    return config is not None and config.is_zero3()
