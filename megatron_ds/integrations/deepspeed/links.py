"""From a parameter to the engine that trains it, for functions that are given parameters alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn

from megatron_ds.engine import Engine


def link(engine: Engine, parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.deepspeed_engine = weakref.ref(engine)  # type: ignore[attr-defined]


def unlink(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.__dict__.pop("deepspeed_engine", None)


def engine_of(parameter: nn.Parameter) -> Engine | None:
    """None: no engine trains it, or no longer."""
    engine = parameter.__dict__.get("deepspeed_engine")
    return None if engine is None else engine()
