"""Nodes of neighbouring ranks, inside of which what ZeRO gathered once is kept (``zero.secondary_size``)."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ds.config import ZeroConfig
from megatron_ds.errors import ConfigError

AxisSizes = Mapping[tuple[str, ...], tuple[int, int]]
"""Ranks of the shard and of the replicate axis, by the mesh axes over which parameters are sharded already."""


def node_size(config: ZeroConfig, axes: AxisSizes, sharded_over: tuple[str, ...]) -> int | None:
    """Ranks of a node, of ``secondary_size`` neighbours, that shard the same part; None: nodes make no difference.

    Neighbours that are sharded over another axis already, as experts are, hold different parts.

    Raises:
        ConfigError: a node would hold some parts more often than others.
    """
    if config.secondary_size is None:
        return None
    parts = axes[()][0] // axes[sharded_over][0]
    if max(parts, config.secondary_size) % min(parts, config.secondary_size):
        over = " x ".join(sharded_over)
        raise ConfigError(
            f"zero.secondary_size={config.secondary_size} and {over}={parts}: a node would hold some of the {parts} "
            f"parts more often than others; use a multiple or a divisor of {parts}"
        )
    size = config.secondary_size // parts
    return size if size > 1 else None
