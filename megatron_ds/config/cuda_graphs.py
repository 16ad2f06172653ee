"""Where a micro-batch cannot be recorded as a CUDA graph: what changes from one to the next is no kernel's argument."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ds.mesh import MeshShape

if TYPE_CHECKING:
    from megatron_ds.config.text import RunConfig


def cuda_graph_faults(config: RunConfig, shape: MeshShape) -> Iterator[str]:
    """Why not every micro-batch of this run launches the same kernels on the same memory, if it does not."""
    if not config.train.cuda_graphs:
        return
    reasons = {
        f"world_size={shape.world_size}": shape.world_size > 1 and "ranks exchange gradients within a backward pass",
        "device='cpu'": config.device == "cpu" and "only a GPU has graphs",
        "data.document_masking": config.data.document_masking and "each batch has its own documents",
        "data.conversations": config.data.conversations and "each batch has its own conversations",
        f"precision.fp8={config.precision.fp8!r}": config.precision.fp8 != "none"
        and "a step's first micro-batch alone makes the weights' FP8 copies",
        f"zero.stage={config.zero.stage}": config.zero.stage > 1 and "gradients have memory only while they come",
        f"pipeline.chunks={config.pipeline.chunks}": config.pipeline.chunks > 1 and "one stage is recorded",
        "compile": config.compile and "compiled code checks its inputs on the host at each call",
        "log.record_steps": bool(config.log.record_steps) and "a graph's actions are not timed apart",
    }
    for setting, why in reasons.items():
        if why:
            yield f"train.cuda_graphs with {setting}: {why}; change that, or use --train.no-cuda-graphs"
