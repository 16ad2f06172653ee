"""Whole tensors out of shards and back: for looking inside, for ``state_dict()``, for export.

Every rank calls every method alike; what one gathers is on all of them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.errors import ConfigError, EngineError, nearest
from megatron_ds.mesh import Mesh
from megatron_ds.optim.ema import EMA
from megatron_ds.shard import ShardSpec, as_real, real_dtype, spec_of
from megatron_ds.shard.flat_shards import FlatShard, acquired
from megatron_ds.zero.main_grad import is_trained
from megatron_ds.zero.optimizer import ZeroOptimizer


class WholeTensors:
    """The tensors of a model and of its optimizer, by name, as they are when this object is made.

    Args:
        average: :meth:`parameter`, and with it :meth:`stream`, gives the moving average of what is trained.
        masters: they give what is trained in the dtype of its master weights, fp32 or fp64, and not of its compute.

    Raises:
        EngineError: the model has parameters that it did not have at initialize().
    """

    def __init__(
        self, module: nn.Module, zero: ZeroOptimizer, mesh: Mesh, average: bool = False, masters: bool = False
    ):
        self._module, self._zero, self._mesh, self._average = module, zero, mesh, average
        self._masters = masters
        _require_known(module)
        self._parameters = {spec_of(p).name: p for p in module.parameters()}
        self._pieces: dict[tuple[str, str], list[FlatShard]] | None = None

    def get(self, name: str, kind: str) -> Tensor:
        """Whole, in the dtype in which it is kept (fp32, or fp64), on the device."""
        self._check_kind(name, kind)
        if self._pieces is None:
            self._pieces = _by_name(self._zero.flat_shards())
        return self._sum(name, self._pieces.get((kind, name), []))

    def gradient(self, name: str) -> Tensor:
        """Whole and as reduced, between reduction and update."""
        spec = self._spec(name)
        if not is_trained(self._parameters[name]):
            raise ConfigError(f"{name} is frozen and has no gradient")
        mine = [flat_shard for flat_shard in self._zero.gradient_shards() if flat_shard.name == name]
        return self._sum(name, mine if self._zero.owns(spec) else [])

    def set(self, values: Mapping[str, Tensor], kind: str) -> None:
        """Write whole tensors of one kind, by name. The parameters follow once all are written."""
        whole = {name: as_real(value) for name, value in values.items()}
        for name, value in whole.items():
            shape = self._spec(name).global_shape
            if tuple(value.shape) != shape:
                raise ConfigError(f"{name} has shape {list(shape)}, the value {list(value.shape)}")
            self._check_kind(name, kind)
        flat_shards = [p for p in self._zero.flat_shards(for_load=True) if p.kind == kind and p.name in whole]
        with torch.no_grad():
            for group, held in acquired(flat_shards, changed=True):
                for flat_shard in group:
                    for box, part in flat_shard.parts(held):
                        part.copy_(whole[flat_shard.name][box.slices])
        self._zero.refresh_parameters()

    @contextlib.contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter], write: bool) -> Iterator[None]:
        """Inside, the parameters are whole; with ``write`` they become what rank 0 of the replicas left in them."""
        with self._zero.gathered(parameters, write):
            yield
            if write:
                with torch.no_grad():
                    for parameter in parameters:
                        comm.broadcast(parameter.data, self._mesh.data)

    def stream(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Every entry of ``module.state_dict()``, one at a time; a shared parameter is one tensor."""
        shared = {id(p) for p in _repeated(self._module)}
        seen: dict[int, Tensor] = {}
        named = dict(self._module.named_parameters(remove_duplicate=False))
        for name in self.names():
            if name not in named:
                yield name, self.buffer(name).to(device, copy=True)
                continue
            parameter = named[name]
            tensor = seen.get(id(parameter))
            if tensor is None:
                tensor = self.parameter(spec_of(parameter).name).to(device, copy=True)
                if id(parameter) in shared:
                    seen[id(parameter)] = tensor
            yield name, tensor

    def names(self) -> list[str]:
        """The keys of ``module.state_dict()`` that are of parameters and buffers, in its order."""
        known = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        known |= {name for name, _ in self._module.named_buffers(remove_duplicate=False)}
        return [name for name in self._module.state_dict(keep_vars=True) if name in known]

    def others(self) -> dict[str, Any]:
        """The other entries: what a module's ``get_extra_state()`` or a hook adds, on this rank."""
        whole, known = self._module.state_dict(keep_vars=True), set(self.names())
        return {name: _apart(value) for name, value in whole.items() if name not in known}

    def parameter(self, name: str) -> Tensor:
        """Whole, in :meth:`dtype`."""
        parameter, dtype = self._parameters[name], self.dtype(name)
        # Before the first update the average is the weights, and its state zero.
        if self._average and self._zero.count and EMA in self._zero.kinds_of(name):
            return self.get(name, EMA).to(dtype)
        if self._zero.config.stage < 3 and not self._spec(name).placements and dtype == parameter.dtype:
            return parameter.detach()
        return self.get(name, "param").to(dtype)

    def dtype(self, name: str) -> torch.dtype:
        """Of what :meth:`parameter` gives: the parameter's own, or that of its master weights."""
        parameter = self._parameters[name]
        return self._dtype(name) if self._masters and not parameter.is_complex() else parameter.dtype

    def buffer(self, name: str) -> Tensor:
        owner, _, last = name.rpartition(".")
        value = self._module.get_submodule(owner)._buffers[last]
        assert value is not None
        return value

    def _sum(self, name: str, flat_shards: Sequence[FlatShard]) -> Tensor:
        """Over all ranks the flat shards hold every element once."""
        spec = self._spec(name)
        whole = torch.zeros(spec.global_shape, dtype=self._dtype(name), device=self._mesh.device)
        for group, held in acquired(flat_shards):
            for flat_shard in group:
                for box, part in flat_shard.parts(held):
                    whole[box.slices] = part.to(whole)
        # Of one rank's bytes and zeros it is the same sum. Of a pipeline only the stages that have it take part.
        stages = self._mesh.pp.size > 1
        for axis in [self._mesh.data, *map(self._mesh.axis, spec.reduce_over)] if stages else [self._mesh.world]:
            comm.all_reduce(comm.movable(whole), axis)
        return torch.view_as_complex(whole) if self._parameters[name].is_complex() else whole

    def _dtype(self, name: str) -> torch.dtype:
        dtype = real_dtype(self._parameters[name].dtype)
        if not is_trained(self._parameters[name]):
            return dtype
        return torch.float64 if dtype == torch.float64 else torch.float32

    def _spec(self, name: str) -> ShardSpec:
        if name not in self._parameters:
            raise ConfigError(f"the model has no parameter {name!r}{nearest(name, self._parameters)}")
        return spec_of(self._parameters[name])

    def _check_kind(self, name: str, kind: str) -> None:
        self._spec(name)
        kinds = ("param", *self._zero.kinds_of(name))
        if kind not in kinds:
            raise ConfigError(f"{name} has no {kind!r}{nearest(kind, kinds)}; there is {', '.join(kinds)}")


def _require_known(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not hasattr(parameter, "shard"):
            raise EngineError(
                f"{name} was added after initialize(), and the engine has no shards of it that it could gather or "
                "save; take it out of the model and put it back afterwards, add it before initialize(), or call "
                "engine.close() and initialize() again"
            )


def _apart(value: Any) -> Any:
    """A copy that does not change with the module."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _by_name(flat_shards: Iterable[FlatShard]) -> dict[tuple[str, str], list[FlatShard]]:
    found: dict[tuple[str, str], list[FlatShard]] = {}
    for flat_shard in flat_shards:
        found.setdefault((flat_shard.kind, flat_shard.name), []).append(flat_shard)
    return found


def _repeated(module: nn.Module) -> list[nn.Parameter]:
    """Parameters with more than one name."""
    every = [parameter for _, parameter in module.named_parameters(remove_duplicate=False)]
    count: dict[int, int] = {}
    for parameter in every:
        count[id(parameter)] = count.get(id(parameter), 0) + 1
    return [parameter for parameter in every if count[id(parameter)] > 1]
