"""What autograd keeps of a real forward pass of a stage: storages, without parameters, buffers and the micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ds.config import BaseRunConfig
from megatron_ds.mesh import Mesh
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.train.build import DTYPES
from megatron_ds.train.task import Task
from megatron_ds.zero.main_grad import MainGradient


def kept_bytes(
    task: Task,
    config: BaseRunConfig,
    span: StageSpan,
    mesh: Mesh,
    batch: Mapping[str, Tensor],
    repeat: bool = False,
    **arguments: Any,
) -> int:
    """``repeat``: of a second forward pass; what both keep, such as tables, are no activations. ``arguments`` are of
    the forward pass; parameters have main gradients."""
    dtype = DTYPES[config.precision.dtype]
    stage = task.make_stage(span, mesh, mesh.device, dtype)
    stage.initialize(1)
    for parameter in stage.parameters():
        parameter.main_grad = MainGradient("", lambda _: None, lambda _: None)  # type: ignore[attr-defined]
        parameter.main_grad.view = torch.zeros(parameter.shape)  # type: ignore[attr-defined]
    known = {t.untyped_storage().data_ptr() for t in (*stage.parameters(), *stage.buffers(), *batch.values())}

    def once() -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}  # which keeps them alive, so that no address comes twice

        def keep(tensor: Tensor) -> Tensor:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        hidden = None
        if not span.embedding:
            hidden = torch.zeros(task.activation_shape(mesh, batch), dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stage(batch, hidden, **arguments)
        return found

    before = once() if repeat else {}
    found = once()
    return sum(t.untyped_storage().nbytes() for place, t in found.items() if place not in known | before.keys())
