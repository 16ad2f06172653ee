"""Every setting of a run: typed, frozen, documented by its own fields.

A run is described by one :class:`RunConfig`. It is read from a TOML file and dotted command-line overrides
(:func:`parse`), and passes :func:`validate` once, before any process group exists. Nothing is corrected in silence:
an unknown key, a contradiction or a size that does not divide is a :class:`~megatron_ds.errors.ConfigError` which
names the values and what would work.
"""

from megatron_ds.config.read import from_dict, load_toml, parse, read_toml, to_toml
from megatron_ds.config.schema import (
    BaseDataConfig,
    BaseModelConfig,
    BaseRunConfig,
    BaseTrainConfig,
    CheckpointConfig,
    LogConfig,
    MeshConfig,
    OffloadConfig,
    OptimizerConfig,
    PipelineConfig,
    PrecisionConfig,
    RecomputeConfig,
    Section,
    ZeroConfig,
)
from megatron_ds.config.sparse import AttentionConfig, SparseAttentionConfig
from megatron_ds.config.text import (
    DataConfig,
    FIMConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ds.config.validate import validate
from megatron_ds.config.zero import zero_faults

__all__ = [
    "AttentionConfig",
    "BaseDataConfig",
    "BaseModelConfig",
    "BaseRunConfig",
    "BaseTrainConfig",
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
    "Section",
    "SparseAttentionConfig",
    "TrainConfig",
    "ZeroConfig",
    "from_dict",
    "load_toml",
    "parse",
    "read_toml",
    "to_toml",
    "validate",
    "zero_faults",
]
