"""Train any ``nn.Module`` with ZeRO: :func:`initialize` gives an :class:`Engine` for a model and a configuration."""

from megatron_ds.engine.assemble import initialize, read_config
from megatron_ds.engine.engine import Engine
from megatron_ds.engine.without_memory import empty_parameters

__all__ = [
    "Engine",
    "empty_parameters",
    "initialize",
    "read_config",
]
