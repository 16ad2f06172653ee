"""A user's model as the one stage of a pipeline, for the executor that runs all models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.errors import EngineError


def loss_of_output(model: Any, micro_batch: Any) -> Tensor:
    """Call the model with a micro-batch (a mapping by name, a sequence in order) and take its output's loss."""
    if isinstance(micro_batch, Mapping):
        output = model(**micro_batch)
    elif isinstance(micro_batch, tuple | list):
        output = model(*micro_batch)
    else:
        output = model(micro_batch)
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif not isinstance(output, Tensor):
        output = output[0] if isinstance(output, tuple | list) else getattr(output, "loss", None)
    if not isinstance(output, Tensor) or output.dim() != 0:
        raise EngineError(
            "the model did not return a loss: a 0-d tensor, or one in `.loss`, ['loss'] or [0] of its output; give "
            "initialize() loss=, a function of the model and a micro-batch"
        )
    return output


def is_stage(model: nn.Module) -> bool:
    """Whether a module is one stage of several, by ``stage_output(call, micro_batch, hidden)``.

    That gives what the next stage gets as ``hidden``, a 1-d floating-point tensor; the last stage's gives the loss.
    ``hidden`` is None on the first stage; ``call`` calls the module.
    """
    return hasattr(model, "stage_output")


class LossStage(nn.Module):
    """A model as a stage of a pipeline, mostly its only one: from a micro-batch to its loss.

    Args:
        cast: the dtype in which the model gets its floating-point inputs; None leaves them.

    Attributes:
        observer: entered around each forward pass with the model's inputs, if there is one.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor], cast: torch.dtype | None):
        super().__init__()
        self.model, self.loss, self.cast = model, loss, cast
        self.observer: Callable[[Any], contextlib.AbstractContextManager[None]] | None = None

    def forward(self, micro_batch: Any, hidden: Tensor | None = None) -> Tensor:
        if not is_stage(self.model):
            return self.loss(self.call, micro_batch)
        stage: Any = self.model
        output: Tensor = stage.stage_output(self.call, micro_batch, hidden)
        return output

    def call(self, *arguments: Any, **keywords: Any) -> Any:
        if self.cast is not None:
            arguments, keywords = map_tensors(self._cast, arguments), map_tensors(self._cast, keywords)
        if self.observer is None:
            return self.model(*arguments, **keywords)
        with self.observer((arguments, keywords)):
            return self.model(*arguments, **keywords)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.cast) if tensor.is_floating_point() else tensor


def to_device(value: Any, device: torch.device) -> Any:
    """Every tensor of a batch on the device. What can do that itself (a BatchEncoding) keeps its attributes."""
    if isinstance(value, Mapping) and hasattr(value, "to"):
        return value.to(device)
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` of each tensor in its mappings and sequences; named tuples keep their names."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = [map_tensors(function, item) for item in value]
        if isinstance(value, tuple):
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return items
    return value
