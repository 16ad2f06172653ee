"""``deepspeed.checkpointing``: activation checkpointing as ``torch.utils.checkpoint`` does it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint

log = logging.getLogger(__name__)


def checkpoint(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs ``function`` again in the backward pass instead of keeping its activations."""
    return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False)


def configure(mpu_: Any = None, deepspeed_config: Any = None, **settings: Any) -> None:
    """Where activations are kept is another matter than what is computed: these settings do nothing, and say so."""
    asked = sorted(name for name, value in settings.items() if value)
    if asked:
        log.warning("deepspeed.checkpointing.configure(%s): activations stay on their device, undivided", asked)


def is_configured() -> bool:
    """True: it needs no configuration."""
    return True


def reset() -> None:
    """Nothing is kept between two steps."""
