"""``deepspeed.pipe``: a model as a list of layers, on one stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from megatron_ds.errors import ConfigError, EngineError
from megatron_ds.integrations.deepspeed.engine import DeepSpeedEngine


class LayerSpec:
    """A layer that is built later: a class and its arguments."""

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any):
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs

    def build(self) -> nn.Module:
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """Layers of one ``key`` are one module. ``forward_fn(module, inputs)``: how this layer uses it."""

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: Any = "weight",
        **module_kwargs: Any,
    ):
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn


class PipelineModule(nn.Module):
    """Layers in a row: modules, :class:`LayerSpec` or functions; ``train_batch`` gives them ``(inputs, labels)``.

    Args:
        num_stages: 1. loss_fn: of the last layer's output and the labels.
        activation_checkpoint_interval: layers that are recomputed as one in the backward pass; 0 for none.

    Raises:
        ConfigError: for more than one stage: between stages this library's pipeline carries one tensor of one shape.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        num_stages: int | None = None,
        topology: Any = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        seed_layers: bool = False,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        **others: Any,
    ):
        super().__init__()
        if num_stages not in (None, 1) or topology is not None:
            raise ConfigError(
                f"PipelineModule(num_stages={num_stages}, topology={topology!r}): stages over several ranks are for "
                "the models of megatron_ds.models, examples/pretrain_gpt.py --mesh.pp; use num_stages=1, with ZeRO"
            )
        self.loss_fn, self.interval = loss_fn, activation_checkpoint_interval
        self.tied_modules = nn.ModuleDict()
        self.forward_funcs: list[Callable[[Any], Any]] = []
        for index, layer in enumerate(layers):
            if seed_layers:
                torch.manual_seed(base_seed + index)
            self.forward_funcs.append(self._function(index, layer))

    def _function(self, index: int, layer: Any) -> Callable[[Any], Any]:
        if isinstance(layer, TiedLayerSpec):
            if layer.key not in self.tied_modules:
                self.tied_modules[layer.key] = layer.build()
            module, forward = self.tied_modules[layer.key], layer.forward_fn
            return module if forward is None else lambda inputs: forward(module, inputs)
        if isinstance(layer, LayerSpec):
            layer = layer.build()
        if isinstance(layer, nn.Module):
            self.add_module(str(index), layer)
        return layer

    def forward(self, forward_input: Any) -> Any:
        step = self.interval or len(self.forward_funcs)
        for start in range(0, len(self.forward_funcs), step):
            functions = self.forward_funcs[start : start + step]
            if self.interval and self.training and torch.is_grad_enabled():
                forward_input = torch.utils.checkpoint.checkpoint(_run, functions, forward_input, use_reentrant=False)
            else:
                forward_input = _run(functions, forward_input)
        return forward_input


def _run(functions: Sequence[Callable[[Any], Any]], value: Any) -> Any:
    for function in functions:
        value = function(value)
    return value


class PipelineEngine(DeepSpeedEngine):
    """Trains a :class:`PipelineModule` by whole batches."""

    _batches: Iterator[Any] | None = None  # of the training data, again and again

    def _loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        output = self(inputs)
        loss_fn: Any = self.engine.module.loss_fn
        return output if loss_fn is None else loss_fn(output, labels)

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """One update from the next micro-batches of ``(inputs, labels)``; the mean loss over these and the ranks."""
        source = self._data() if data_iter is None else data_iter
        self.train()
        for _ in range(self.gradient_accumulation_steps()):
            self.backward(self._loss(next(source)))
            self.step()
        assert self.engine.last is not None
        return torch.tensor(self.engine.last.loss, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def eval_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """The mean loss of as many micro-batches, over the ranks."""
        batches = [next(data_iter) for _ in range(self.gradient_accumulation_steps())]
        self.eval()
        total = sum((self._loss(batch).double() for batch in batches), torch.zeros((), dtype=torch.float64))
        total /= len(batches) * self.dp_world_size
        if self.dp_world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    def _data(self) -> Iterator[Any]:
        if self.training_dataloader is None:
            raise EngineError("train_batch() without an iterator takes training_data, which initialize() was not given")
        if self._batches is None:
            self._batches = _repeated(self.training_dataloader)
        return self._batches


def _repeated(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
