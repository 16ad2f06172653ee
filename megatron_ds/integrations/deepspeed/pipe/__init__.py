"""``deepspeed.pipe``: a model as a list of layers, on one pipeline stage or on several."""

from megatron_ds.integrations.deepspeed.pipe.engine import PipelineEngine
from megatron_ds.integrations.deepspeed.pipe.module import (
    LayerSpec,
    PipeDataParallelTopology,
    PipelineModule,
    TiedLayerSpec,
)

__all__ = [
    "LayerSpec",
    "PipeDataParallelTopology",
    "PipelineEngine",
    "PipelineModule",
    "TiedLayerSpec",
]
