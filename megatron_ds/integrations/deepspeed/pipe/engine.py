"""The engine of a :class:`PipelineModule`: it trains and evaluates by whole batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_ds.errors import ConfigError, EngineError
from megatron_ds.integrations.deepspeed.engine import DeepSpeedEngine
from megatron_ds.integrations.deepspeed.pipe.module import PipelineModule
from megatron_ds.integrations.deepspeed.utils import RepeatingLoader


class PipelineEngine(DeepSpeedEngine):
    """Trains a :class:`PipelineModule` by batches of ``(inputs, labels)``.

    The first stage takes the inputs and the last one the labels; others need no data.
    """

    _batches: Iterator[Any] | None = None  # where train_batch() was given none
    _batch_fn: Callable[[Any], Any] | None = None

    @property
    def num_stages(self) -> int:
        return self._module.num_stages

    @property
    def stage_id(self) -> int:
        return self._module.stage_id

    @property
    def micro_batches(self) -> int:
        return self.gradient_accumulation_steps()

    @property
    def _module(self) -> PipelineModule:
        module = self.engine.module
        assert isinstance(module, PipelineModule)
        return module

    def is_first_stage(self) -> bool:
        return self._module.is_first

    def is_last_stage(self) -> bool:
        return self._module.is_last

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """One update from the next micro-batches of ``(inputs, labels)``; the mean loss over these and the ranks."""
        self._require_trains()
        if not torch.is_grad_enabled():
            raise EngineError("train_batch() computes gradients, which are switched off here; use eval_batch()")
        result = self.engine.train_batch(self._next(data_iter, self.micro_batches))
        self._applied = not result.skipped
        self.micro_steps += self.micro_batches
        return torch.tensor(result.loss, dtype=torch.float64, device=self.device)

    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Tensor:
        """The mean loss of as many micro-batches as ``train_batch`` takes, over the ranks; on every rank."""
        if return_logits or not compute_loss or reduce_output != "avg":
            raise ConfigError(
                f"eval_batch(return_logits={return_logits}, compute_loss={compute_loss}, "
                f"reduce_output={reduce_output!r}) gives the mean loss alone; let loss_fn return what is wanted of the "
                "output, or run a PipelineModule of one stage by itself"
            )
        self.eval()
        loss = self.engine.eval_batch(self._next(data_iter, num_micro_batches or self.micro_batches))
        return torch.tensor(loss, dtype=torch.float64, device=self.device)

    def set_dataloader(self, loader: Iterable[Any]) -> None:
        """What ``train_batch()`` takes, again and again, where it is given no iterator."""
        self.training_dataloader, self._batches = loader, None

    def set_dataiterator(self, iterator: Iterator[Any]) -> None:
        """What ``train_batch()`` takes where it is given none."""
        self._batches = iterator

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """Makes ``(inputs, labels)`` of what the data gives."""
        self._batch_fn = fn

    def _next(self, given: Iterator[Any] | None, count: int) -> list[Any]:
        """A stage in the middle takes what an iterator gives as well, so that it ends where the others' do."""
        ends = self._module.is_first or self._module.is_last
        if given is None and not ends:
            return [None] * count
        source = self._data() if given is None else given
        batches = [next(source) for _ in range(count)]
        if not ends:
            return [None] * count
        return batches if self._batch_fn is None else [self._batch_fn(batch) for batch in batches]

    def _data(self) -> Iterator[Any]:
        if self._batches is None:
            if self.training_dataloader is None:
                raise EngineError(
                    "train_batch() without an iterator takes training_data, which initialize() was not given"
                )
            self._batches = iter(RepeatingLoader(self.training_dataloader))
        return self._batches

    def _by_batch_alone(self, *_: Any, **__: Any) -> Any:
        raise EngineError("a pipeline runs whole batches; call train_batch(data_iter) or eval_batch(data_iter)")

    forward = backward = step = _by_batch_alone

    def save_16bit_model(self, *arguments: Any, **keywords: Any) -> bool:
        if self.num_stages > 1:
            raise EngineError(
                "save_16bit_model() writes one stage's weights into a file of all; call save_checkpoint(), and then "
                "python tools/zero_to_fp32.py CHECKPOINTS OUTPUT --dtype bf16"
            )
        return super().save_16bit_model(*arguments, **keywords)

    save_fp16_model = save_16bit_model
