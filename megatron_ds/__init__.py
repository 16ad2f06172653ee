"""megatron-ds: transformers that do not fit on one device, in plain PyTorch, with the same numbers on every mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ds.engine import Engine, empty_parameters, initialize

__version__ = "0.1.0"
__all__ = ["Engine", "empty_parameters", "initialize"]


def __getattr__(name: str) -> Any:
    """The engine's names, imported when they are asked for."""
    if name in __all__:
        from megatron_ds import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
