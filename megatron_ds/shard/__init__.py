"""Which part of which global tensor a rank holds: shards, boxes of a tensor, flat ranges of a shard."""

from megatron_ds.shard.spec import (
    Init,
    Line,
    ShardedDim,
    ShardSpec,
    as_real,
    empty_parameter,
    real_dtype,
    shaped_as,
    spec_of,
)

__all__ = [
    "Init",
    "Line",
    "ShardSpec",
    "ShardedDim",
    "as_real",
    "empty_parameter",
    "real_dtype",
    "shaped_as",
    "spec_of",
]
