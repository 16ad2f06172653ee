"""A model as a list of layers, of which each pipeline stage holds some."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.comm.together import exchange
from megatron_ds.errors import ConfigError
from megatron_ds.integrations.deepspeed.comm import init_distributed
from megatron_ds.integrations.deepspeed.pipe.packed import pack, unpack
from megatron_ds.mesh import Mesh
from megatron_ds.pipeline.layer_split import split_layers
from megatron_ds.shard import ShardSpec, as_real

_OTHERS = ("activation_checkpoint_func", "checkpointable_layers", "dynamic_shape", "seed_fn")


class LayerSpec:
    """A layer that is built later: a class and its arguments."""

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any):
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs

    def build(self, log: bool = False) -> nn.Module:
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """Layers of one ``key`` are one module, on whatever stages: all its parameters are shared.

    Args:
        forward_fn: of the module and the inputs: how this layer uses it.
    """

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


class PipeDataParallelTopology:
    """``num_pp`` stages, each on ``num_dp`` data-parallel ranks."""

    def __init__(self, num_pp: int, num_dp: int):
        self.sizes = {"pipe": num_pp, "data": num_dp}

    def get_dim(self, axis: str) -> int:
        return self.sizes.get(axis, 1)


class PipelineModule(nn.Module):
    """Layers in a row: modules, :class:`LayerSpec` or functions. A rank has those of its stage, under global names.

    Every rank builds every layer, in order, and drops what is another stage's: so the model is the same on any number
    of stages.

    Args:
        num_stages: divides the ranks; consecutive ones are data-parallel ranks of one stage.
        topology: instead of it, with ``get_dim("pipe")``.
        loss_fn: of the last layer's output and the labels. None: the last layer gives the loss.
        partition_method: ``"parameters"``, ``"uniform"``, or ``"type:REGEX"``: what each stage gets an equal part of,
            as nearly as can be: trained parameters, layers, or layers of a class that the expression finds.
        activation_checkpoint_interval: layers that are recomputed as one in the backward pass; 0 for none.
        others: ``checkpointable_layers``, names of the classes that are (default: all that have parameters);
            ``activation_checkpoint_func``; ``seed_fn``; ``dynamic_shape``, as shapes may be in any case.

    Raises:
        ConfigError: stages that do not divide the ranks or the layers, a topology of model-parallel ranks.
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
        unknown = sorted(others.keys() - _OTHERS)
        if unknown:
            raise TypeError(f"PipelineModule takes no {', '.join(unknown)}; it takes {', '.join(_OTHERS)} besides")
        self.num_stages = _stages(num_stages, topology)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.stage_id = rank // (world // self.num_stages)
        self.loss_fn, self.interval = loss_fn, activation_checkpoint_interval
        self._eligible: list[str] | None = others.get("checkpointable_layers")
        self._checkpoint: Callable[..., Any] = others.get("activation_checkpoint_func") or functools.partial(
            torch.utils.checkpoint.checkpoint, use_reentrant=False
        )
        specs = list(layers)
        counts = split_layers(len(specs), self.num_stages, *_costs(specs, partition_method))
        self.parts = [sum(counts[:stage]) for stage in range(self.num_stages + 1)]
        self.tied_modules = nn.ModuleDict()
        self.tied_stages: dict[str, list[int]] = {}
        self.forward_funcs: list[Callable[[Any], Any]] = []
        seed = (others.get("seed_fn") or _seed) if seed_layers else None
        for stage in range(self.num_stages):
            for index in range(self.parts[stage], self.parts[stage + 1]):
                if seed is not None:
                    seed(base_seed + index)
                self._add(index, specs[index], stage)
        for key in [key for key, stages in self.tied_stages.items() if self.stage_id not in stages]:
            del self.tied_modules[key]

    def _add(self, index: int, layer: Any, stage: int) -> None:
        mine = stage == self.stage_id
        function: Callable[[Any], Any]
        if isinstance(layer, TiedLayerSpec):
            if layer.key not in self.tied_modules:
                self.tied_modules[layer.key] = layer.build()
            stages = self.tied_stages.setdefault(layer.key, [])
            if stage not in stages:
                stages.append(stage)
            module = self.tied_modules[layer.key]
            function = module if layer.forward_fn is None else functools.partial(layer.forward_fn, module)
        else:
            function = layer.build() if isinstance(layer, LayerSpec) else layer
            if mine and isinstance(function, nn.Module):
                self.add_module(str(index), function)
        if mine:
            self.forward_funcs.append(function)

    def tie(self, mesh: Mesh) -> None:
        """Makes tied modules one over their stages: equal from now on, with gradients that are summed.

        Raises:
            ConfigError: on all ranks, where a stage has nothing to train.
        """
        trains = exchange(mesh.pp, "trains" if any(p.requires_grad for p in self.parameters()) else "")
        idle = [stage for stage, said in enumerate(trains) if not said]
        if idle:
            raise ConfigError(
                f"stages {idle} of {self.num_stages} have no parameters that require a gradient (stages begin with "
                f"layers {self.parts[:-1]}); use another partition_method, or fewer stages"
            )
        for key, stages in self.tied_stages.items():
            if len(stages) == 1:
                continue
            axis = mesh.add_stages_axis(f"tied_{key}", stages)
            if self.stage_id not in stages:
                continue
            for name, parameter in self.tied_modules[key].named_parameters():
                with torch.no_grad():
                    parameter.data = parameter.data.to(mesh.device)
                    comm.broadcast(parameter.data, axis)
                parameter.shard = ShardSpec(  # type: ignore[attr-defined]
                    f"tied_modules.{key}.{name}",
                    tuple(as_real(parameter.data).shape),
                    reduce_over=(axis.name,),
                    replica=self.stage_id != stages[0],
                    weight_decay=parameter.dim() > 1,
                )

    @property
    def is_first(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last(self) -> bool:
        return self.stage_id == self.num_stages - 1

    def forward(self, forward_input: Any) -> Any:
        step = self.interval or len(self.forward_funcs)
        for start in range(0, len(self.forward_funcs), step):
            functions = self.forward_funcs[start : start + step]
            recomputed = self.interval and self.training and torch.is_grad_enabled() and self._recomputes(functions)
            if recomputed:
                inputs = forward_input if isinstance(forward_input, tuple) else (forward_input,)
                forward_input = self._checkpoint(functools.partial(_run, functions), *inputs)
            else:
                forward_input = _run(functions, forward_input)
        return forward_input

    def _recomputes(self, functions: Sequence[Callable[[Any], Any]]) -> bool:
        modules = [function for function in functions if isinstance(function, nn.Module)]
        if self._eligible is not None:
            return all(type(module).__name__ in self._eligible for module in modules)
        return any(True for module in modules for _ in module.parameters())

    def stage_output(self, call: Callable[[Any], Any], micro_batch: Any, hidden: Tensor | None) -> Tensor:
        """The output as one flat tensor for the next stage, or the loss; see ``engine.loss_stage.is_stage``."""
        output = call(micro_batch[0] if hidden is None else unpack(hidden))
        if not self.is_last:
            return pack(output, hidden)
        loss: Tensor = output if self.loss_fn is None else self.loss_fn(output, micro_batch[1])
        return loss if hidden is None else loss + hidden[:0].sum().to(loss.dtype)  # 0: each input gets a gradient


def _run(functions: Sequence[Callable[[Any], Any]], *inputs: Any) -> Any:
    value: Any = inputs[0] if len(inputs) == 1 else inputs
    for function in functions:
        value = function(value)
    return value


def _stages(num_stages: int | None, topology: Any) -> int:
    if num_stages is None and topology is None:
        raise ConfigError("PipelineModule needs num_stages= or topology=; num_stages=1 is a model on every rank")
    init_distributed()
    if topology is not None:
        num_stages = int(topology.get_dim("pipe"))
        others = [axis for axis in getattr(topology, "get_axis_names", list)() if axis not in ("pipe", "data")]
        if any(topology.get_dim(axis) > 1 for axis in others):
            raise ConfigError(
                f"topology= has model-parallel ranks ({', '.join(others)}); use PipeDataParallelTopology, or a family "
                "of megatron_ds.models with --mesh.tp"
            )
    assert num_stages is not None
    world = dist.get_world_size() if dist.is_initialized() else 1
    if num_stages < 1 or world % num_stages:
        raise ConfigError(
            f"num_stages={num_stages} does not divide the {world} ranks; start a multiple of it, or change it"
        )
    return num_stages


def _costs(specs: Sequence[Any], method: str) -> tuple[Any, float, float, Any]:
    """What :func:`split_layers` takes after the numbers of layers and stages."""
    kind, _, pattern = method.partition(":")
    if kind.lower() == "uniform":
        return 1.0, 0.0, 0.0, "count"
    if kind.lower() == "parameters":
        return [float(_trained(spec)) for spec in specs], 0.0, 0.0, "cost"
    if kind.lower() == "type" and pattern:
        found = [bool(re.search(pattern, _name(spec), re.IGNORECASE)) for spec in specs]
        if not any(found):
            raise ConfigError(
                f"partition_method={method!r} finds none of the layers {', '.join(dict.fromkeys(map(_name, specs)))}"
            )
        return [float(one) for one in found], 0.0, 0.0, "cost"
    raise ConfigError(f"partition_method={method!r} is unknown; use 'parameters', 'uniform' or 'type:REGEX'")


def _trained(spec: Any) -> int:
    module = spec.build() if isinstance(spec, LayerSpec) else spec
    parameters = module.parameters() if isinstance(module, nn.Module) else []
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def _name(spec: Any) -> str:
    if isinstance(spec, LayerSpec):
        return spec.typename.__name__
    return getattr(spec, "__name__", type(spec).__name__)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
