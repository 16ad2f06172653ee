"""What an engine's shards hold, as whole tensors by name: parameters, gradients, optimizer state; and bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.config.engine import EngineConfig
from megatron_ds.engine.late_ranks import LateRanks
from megatron_ds.engine.resizing import resizing
from megatron_ds.engine.tensors import WholeTensors
from megatron_ds.errors import EngineError
from megatron_ds.mesh import Mesh
from megatron_ds.train.step import TrainStep
from megatron_ds.zero.byte_table import bytes_table
from megatron_ds.zero.optimizer import ZeroOptimizer

if TYPE_CHECKING:
    from megatron_ds.engine.engine import Engine


class Inspection:
    """The methods of an engine that look inside or change what is there.

    Every rank calls each of them alike, and what it gives is on all.
    """

    module: nn.Module
    config: EngineConfig
    mesh: Mesh
    zero: ZeroOptimizer
    train_step: TrainStep
    steps: int
    _done: int
    _complete: bool
    _seed: Tensor | None
    _late: LateRanks

    if TYPE_CHECKING:  # the engine's

        def _count(self, micro_batches: int) -> Tensor: ...
        def _share_buffers(self) -> None: ...
        def _drop_gradients(self) -> None: ...
        def require_between_steps(self, what: str) -> None: ...

    def _awaited(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Around what takes all ranks, of which some may not come."""
        return self._late.awaited(what, self.steps + 1)

    def tensors(self, average: bool = False, masters: bool = False) -> WholeTensors:
        """The whole tensors behind the shards, of this moment; ``average``: of parameters their moving average.

        ``masters``: of parameters in the dtype of the master weights, and not in that of the forward pass.
        """
        return WholeTensors(self.module, self.zero, self.mesh, average, masters)

    @property
    def keeps_average(self) -> bool:
        """Whether there is a moving average of the weights: ``optimizer.ema_decay`` is set."""
        return self.config.optimizer.ema_decay > 0

    @contextlib.contextmanager
    def gathered(
        self, parameters: nn.Parameter | Iterable[nn.Parameter] | None = None, write: bool = False
    ) -> Iterator[None]:
        """The parameters (default: all) are whole inside. ``write``: what rank 0 changed holds everywhere after.

        To write takes a moment between two steps; a forward pass that no backward pass has followed is forgotten.
        """
        if write:
            self.require_between_steps("gathered(write=True)")
            if self._seed is not None:
                self._drop_gradients()
        chosen = self.module.parameters() if parameters is None else parameters
        with self.tensors().gathered([chosen] if isinstance(chosen, nn.Parameter) else list(chosen), write):
            yield

    def resizing(self) -> contextlib.AbstractContextManager[None]:
        """Inside, parameters may get another shape, as by ``model.resize_token_embeddings(n)``, on all ranks alike.

        Afterwards those are trained in place of the old ones. Rows that there were keep their master weights and state,
        new ones have rank 0's values and a state of zero. Between two steps.
        """
        return resizing(cast("Engine", self))

    def get_parameter(self, name: str) -> Tensor:
        """The whole master weight, in fp32 (fp64), on every rank."""
        return self.tensors().get(name, "param")

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Set it on all ranks, which give the same value."""
        self.set_parameters({name: value})

    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Set the master weights of several at once, by name: an engine in bf16 or fp16 begins with rounded ones."""
        self.tensors().set(values, "param")

    def get_optimizer_state(self, name: str, kind: str) -> Tensor:
        """A parameter's whole optimizer state, such as ``"exp_avg"``."""
        return self.tensors().get(name, kind)

    def set_optimizer_state(self, name: str, kind: str, value: Tensor) -> None:
        self.tensors().set({name: value}, kind)

    def get_gradient(self, name: str, partial: bool = False) -> Tensor:
        """A parameter's whole gradient, averaged and before clipping, between the step's last backward and step().

        Args:
            partial: the backward pass that there was last is the step's last one.
        """
        if partial and self._done:
            self._complete = True
        self._require_whole_gradients()
        self.train_step.reduce()
        return self.tensors().gradient(name) / self._excess().item()

    def get_gradient_norm(self) -> Tensor:
        """Their global L2 norm, before clipping: 0-d float64, between the step's last backward and step()."""
        self._require_whole_gradients()
        self.train_step.reduce()
        return comm.all_reduce(self.zero.norm_squared(), self.mesh.world).sqrt() / self._excess()

    def _excess(self) -> Tensor:
        return self.train_step.excess(self._count(self._done)) * self.train_step.scaler.scale

    def _require_whole_gradients(self) -> None:
        if not self._complete:
            raise EngineError("gradients are whole between the last backward() of a step and step() only")

    def state_dict(self, device: torch.device | str = "cpu", average: bool = False) -> dict[str, Any]:
        """Every parameter and persistent buffer, whole, as ``module.state_dict()`` would be on one process.

        Modules' extra state is this rank's. ``average``: the moving average of the parameters that are trained.
        """
        with self._awaited("state_dict()"):
            self._share_buffers()
            tensors = self.tensors(average)
            found = {**dict(tensors.stream(device)), **tensors.others()}
            return {name: found[name] for name in self.module.state_dict(keep_vars=True)}

    def bytes_report(self) -> dict[str, int]:
        """Bytes this rank holds, by kind."""
        return self.zero.bytes_report()

    def bytes_table(self) -> str:
        """The same by where they live between steps, as a table."""
        return bytes_table(self.zero.bytes_by_store())
