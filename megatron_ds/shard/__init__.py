"""Which part of which global tensor a rank holds: shards, boxes of a tensor, flat ranges of a shard."""

from megatron_ds.shard.spec import (
    WHOLE,
    Init,
    Line,
    Matrices,
    ShardedDim,
    ShardSpec,
    as_real,
    empty_parameter,
    in_order,
    memory_order,
    real_dtype,
    set_matrices,
    shaped_as,
    spec_of,
)
