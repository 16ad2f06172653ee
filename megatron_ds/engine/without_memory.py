"""Models larger than one rank's memory: parameters without memory at first, given values a unit at a time.

::

    with megatron_ds.empty_parameters():
        model = LlamaForCausalLM(config)
    engine = megatron_ds.initialize(model, {"zero": {"stage": 3}}, optimizer, weights="path/to/folder")

Without ``weights`` each module initialises its own parameters, from a seed that depends on the run's seed and on the
module's name alone: so the values do not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from megatron_ds.convert.folder import WeightFolder
from megatron_ds.errors import CheckpointError, ConfigError, nearest
from megatron_ds.rng import derive_seed

Weights = str | Path | Callable[[nn.Module], None] | None


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Modules made inside have parameters on the meta device; buffers have their values. Not for several threads.

    Every parameter has its memory for as long as its own module takes to make it, and no longer.
    """
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def take_places(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Move meta parameters to the device, still without memory; the objects stay the same. False: there are none."""
    empty = [parameter for parameter in model.parameters() if parameter.is_meta]
    wanted = dtypes_of(model, dtype)
    for parameter in empty:
        place = torch.empty(parameter.shape, dtype=wanted[parameter], device=device)
        place.untyped_storage().resize_(0)
        torch.utils.swap_tensors(parameter, nn.Parameter(place, parameter.requires_grad))
    return bool(empty)


def dtypes_of(model: nn.Module, dtype: torch.dtype | None) -> dict[Tensor, torch.dtype]:
    """What each parameter is to be of, and each running statistic of a norm; ``dtype``: None leaves all as they are.

    A norm with running statistics, as BatchNorm, has these and its parameters in fp32 where the rest is in half
    precision: torch takes inputs in half precision only with both of them in fp32, or neither.
    """
    found: dict[Tensor, torch.dtype] = {}
    for module in model.modules():
        running = isinstance(module, _NormBase) and module.running_mean is not None
        own = torch.promote_types(dtype, torch.float32) if running and dtype is not None else dtype
        for tensor in [*module.parameters(recurse=False), *(module.buffers(recurse=False) if running else ())]:
            found[tensor] = own if own is not None and tensor.is_floating_point() else tensor.dtype
    return found


def has_memory(parameter: Tensor) -> bool:
    return parameter.numel() == 0 or parameter.untyped_storage().nbytes() > 0


class Filler:
    """Gives parameters their values once they have memory; see ``fill`` of ZeroOptimizer.

    Args:
        weights: a folder of safetensors files, or what initialises a module's own parameters. Default: the model's
            ``_init_weights`` (transformers), else the module's ``reset_parameters``.
    """

    def __init__(self, model: nn.Module, seed: int, weights: Weights):
        self._model, self._seed = model, seed
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        # What has values before its turn keeps them.
        self._kept = {id(p): p.detach() for p in model.parameters() if has_memory(p)}
        self._folder = WeightFolder(Path(weights), None) if isinstance(weights, str | Path) else None
        self._init = weights if callable(weights) else None
        if self._folder is not None:
            self._fill_buffers(self._folder)
        self._done: set[int] = set()  # with values
        self._given: set[int] = set()  # asked for

    @torch.no_grad()
    def __call__(self, parameters: Sequence[nn.Parameter]) -> None:
        empty = []
        self._given |= {id(parameter) for parameter in parameters}
        for parameter in parameters:
            kept = self._kept.pop(id(parameter), None)
            if kept is not None:
                parameter.data.copy_(kept)
            elif id(parameter) not in self._done:
                empty.append(parameter)
        if self._folder is not None:
            for parameter in empty:
                parameter.data.copy_(_read(self._folder, self._names[id(parameter)], parameter.shape))
        else:
            self._initialize(empty)

    def fill_rest(self) -> None:
        """Frozen parameters that nobody shards get memory of their own."""
        rest = [p for p in self._model.parameters() if id(p) not in self._given and not has_memory(p)]
        for parameter in rest:
            parameter.data = torch.empty_like(parameter.data)
        self(rest)

    def _initialize(self, parameters: Iterable[nn.Parameter]) -> None:
        """Run the initialisation of every module that owns one of them."""
        wanted = {id(parameter) for parameter in parameters}
        for name, module in self._model.named_modules():
            own = [p for p in module.parameters(recurse=False) if id(p) in wanted]
            if not own:
                continue
            self._lend_memory(name, module)
            with torch.random.fork_rng(devices=[own[0].device] if own[0].is_cuda else []):
                torch.manual_seed(derive_seed(self._seed, "initial", name))
                self._initializer(name, module)(module)
            self._done |= {id(p) for p in module.parameters(recurse=False)}

    def _lend_memory(self, name: str, module: nn.Module) -> None:
        """An initialisation writes all of its module's parameters, those too whose turn has not come: these keep it."""
        for parameter in module.parameters(recurse=False):
            if has_memory(parameter):
                continue
            if id(parameter) in self._given:
                raise ConfigError(f"the parameters of {name} are not gathered together; give initialize() a folder")
            parameter.data = torch.empty_like(parameter.data)
            self._kept[id(parameter)] = parameter.data

    def _initializer(self, name: str, module: nn.Module) -> Callable[[nn.Module], Any]:
        if self._init is not None:
            return self._init
        path = name.split(".") if name else []
        for depth in range(len(path), -1, -1):  # the nearest model around it knows how its modules begin
            around = self._model.get_submodule(".".join(path[:depth]))
            own: Callable[[nn.Module], Any] | None = getattr(around, "_init_weights", None)
            if own is not None:
                return own
        for method in ("reset_parameters", "_reset_parameters"):
            if hasattr(module, method):
                return lambda module: getattr(module, method)()
        raise ConfigError(
            f"{name or 'the model'} ({type(module).__name__}) has parameters without values and no reset_parameters(); "
            "give initialize() weights=: a folder of safetensors, or a function that initialises a module"
        )

    def _fill_buffers(self, folder: WeightFolder) -> None:
        for name, buffer in self._model.named_buffers():
            if name in folder.shapes:
                buffer.copy_(_read(folder, [name], buffer.shape))


def _read(folder: WeightFolder, names: Sequence[str], shape: Sequence[int]) -> Tensor:
    """The tensor under the first of ``names`` that is there.

    Raises:
        CheckpointError: there is none, or it is of another shape, which ``copy_`` would repeat until it fits.
    """
    for name in names:
        if name in folder.shapes:
            if folder.shapes[name] != tuple(shape):
                raise CheckpointError(
                    f"{folder.path}: {name} is {list(folder.shapes[name])}, and the model's is {list(shape)}; give the "
                    "weights of this model, or the model the sizes of these"
                )
            return folder.read(name)
    raise CheckpointError(f"{folder.path} has no {' or '.join(names)}{nearest(names[0], folder.shapes)}")
