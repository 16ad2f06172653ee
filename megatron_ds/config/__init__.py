"""Every setting of a run: typed, frozen, documented by its own fields.

A run is described by one :class:`RunConfig`. It is read from a TOML file and dotted command-line overrides
(:func:`parse`), and passes :func:`validate` once, before any process group exists. Nothing is corrected in silence:
an unknown key, a contradiction or a size that does not divide is a :class:`~megatron_ds.errors.ConfigError` which
names the values and what would work.
"""

from megatron_ds.config.read import from_dict, load_toml, parse, to_toml
from megatron_ds.config.schema import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    FIMConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OffloadConfig,
    OptimizerConfig,
    PipelineConfig,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
    SparseAttentionConfig,
    TrainConfig,
    ZeroConfig,
)
from megatron_ds.config.validate import divisors, validate
from megatron_ds.config.zero import zero_faults

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "DataConfig",
    "FIMConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OffloadConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "PrecisionConfig",
    "RecomputeConfig",
    "RunConfig",
    "SparseAttentionConfig",
    "TrainConfig",
    "ZeroConfig",
    "divisors",
    "from_dict",
    "load_toml",
    "parse",
    "to_toml",
    "validate",
    "zero_faults",
]
