"""Reads a checkpoint that DeepSpeed 0.19.8 wrote at ZeRO stage 1, 2 or 3: the fp32 weights, whole, under their names.

A folder ``DIRECTORY/TAG`` holds, of R data-parallel ranks,

- ``mp_rank_00_model_states.pt``, at stage 3 one ``zero_pp_rank_N_mp_rank_00_model_states.pt`` a rank: names and shapes
  of the parameters in each of the optimizer's groups, buffers, frozen parameters, and which names share a parameter;
- ``[bf16_]zero_pp_rank_N_mp_rank_00_optim_states.pt``: rank N's part of the fp32 master weights.

At stages 1 and 2 a group's parameters lie one behind the other in one vector, which is cut over the ranks. At stage 3
each parameter is cut over the ranks, and a rank's parts lie one behind the other.

The files are pickles. They are read by torch's weights-only reader: what it does not know (enumerations, loss scalers,
a script's own objects) becomes an inert :class:`Unread`, and nothing that a file names is imported or called.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds.errors import CheckpointError

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_STAGE_ENUM = "deepspeed.runtime.zero.config.ZeroStageEnum"


class Unread:
    """Stands for an object of a class that is not known here: takes any state and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Unread:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclass(frozen=True)
class _Rank:
    """What one rank's optimizer file says: its path, the stage, the number of ranks, its part of each group.

    ``paddings``: elements behind each parameter of each group, where zero_optimization.parameter_alignment is set.
    """

    path: Path
    stage: int
    ranks: int
    groups: list[Tensor]
    paddings: list[list[int]]


def is_theirs(folder: Path) -> bool:
    return folder.is_dir() and any(_OPTIMIZER.fullmatch(p.name) or _MODEL.fullmatch(p.name) for p in folder.iterdir())


def read_weights(folder: Path, exclude_frozen: bool = False) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, floating-point ones in fp32; names of one parameter give one tensor.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind, or the parts do not fit together.
    """
    ranks = _ranks(folder)
    models = [_model(folder, rank.stage, number) for number, rank in enumerate(ranks)]
    model, stage, aliases = models[0], ranks[0].stage, models[0]["shared_params"]
    trained = _of_groups(ranks, model) if stage < 3 else _of_parameters(ranks, model)
    module = {name: value for name, value in model["module"].items() if isinstance(value, Tensor)}
    found = {name: value for name, value in module.items() if name in set(model["buffer_names"])} | trained
    if not exclude_frozen:
        found |= _frozen(models, stage)
        if stage < 3:  # at stage 1 they are where all others are, and nowhere else
            found |= {name: value for name, value in module.items() if name not in found and name not in aliases}
    whole = {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
    return whole | {alias: whole[name] for alias, name in aliases.items() if name in whole}


# --- files


def _ranks(folder: Path) -> list[_Rank]:
    names = sorted(path.name for path in folder.iterdir())
    found = {int(match[1]): match for name in names if (match := _OPTIMIZER.fullmatch(name))}
    several = [name for name in names if (m := _OPTIMIZER.fullmatch(name) or _MODEL.fullmatch(name)) and int(m[2])]
    layers = [name for name in names if name.startswith("layer_")]
    if several or layers:
        raise CheckpointError(
            f"{folder} has {(several or layers)[0]}: it is of a model divided over tensor-parallel ranks or pipeline "
            "stages; use DeepSpeed's own ds_to_universal.py"
        )
    if not found:
        raise CheckpointError(
            f"{folder} has no *_optim_states.pt of ZeRO: at stage 0 the weights are the entry 'module' of "
            "mp_rank_00_model_states.pt; give the folder of a checkpoint of stage 1, 2 or 3"
        )
    ranks = [_rank(folder / match[0]) for _, match in sorted(found.items())]
    wanted = max(rank.ranks for rank in ranks)
    missing, extra = sorted(set(range(wanted)) - found.keys()), sorted(found.keys() - set(range(wanted)))
    if missing or extra:
        raise CheckpointError(
            f"{folder} is a checkpoint of {wanted} ranks, and *_optim_states.pt of rank "
            f"{', '.join(map(str, missing or extra))} {'are missing' if missing else 'are of another one'}; copy the "
            "whole folder, as every rank has written it"
        )
    kinds = {(rank.stage, rank.ranks, len(rank.groups)) for rank in ranks}
    if len(kinds) > 1:
        raise CheckpointError(f"the files of {folder} are of different checkpoints; copy the whole folder again")
    return ranks


def _rank(path: Path) -> _Rank:
    state = _entry(_load(path), path, "optimizer_state_dict", dict)
    stage, ranks = state.get("zero_stage"), state.get("partition_count")
    if stage not in (1, 2, 3) or not ranks:
        raise CheckpointError(f"{path} is no part of a checkpoint of ZeRO stage 1, 2 or 3 (its zero_stage is {stage})")
    groups = _entry(state, path, "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups", list | tuple)
    if not all(isinstance(group, Tensor) and group.dim() == 1 for group in groups):
        raise CheckpointError(f"{path} holds fp32 weights that are no flat tensors")
    # Of several: experts are divided over fewer ranks than the rest.
    ranks = int(max(ranks) if isinstance(ranks, list | tuple) else ranks)
    return _Rank(path, int(stage), ranks, list(groups), state.get("param_alignment_paddings") or [])


def _model(folder: Path, stage: int, rank: int) -> dict[str, Any]:
    """The model's part: at stage 3 of each rank, else the one that there is."""
    path = folder / (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt")
    if stage < 3 and rank > 0:
        return {}
    model = _load(path)
    kinds: Mapping[str, Any] = {"module": dict, "buffer_names": list, "param_shapes": list, "shared_params": dict}
    return model | {name: _entry(model, path, name, kind) for name, kind in kinds.items()}


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the whole folder of the checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: {damaged} in it does not match its checksum")
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        known: list[Any] = [(int if name == _STAGE_ENUM else Unread, name) for name in unknown]
        with torch.serialization.safe_globals(known):
            values = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a pickle may be broken in any way
        # torch's advice stands around what is wrong, in paragraphs of its own.
        said = str(error).split("\n\nCheck the documentation")[0].strip().rsplit("\n\n", 1)[-1]
        said = said.rpartition("WeightsUnpickler error:")[2].strip()
        raise CheckpointError(f"{path} cannot be read as a file of torch.save: {said}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not the dictionary that DeepSpeed writes")
    return values


def _entry(values: Mapping[str, Any], path: Path, name: str, kind: Any) -> Any:
    if not isinstance(values.get(name), kind):
        raise CheckpointError(f"{path} has no {name} as DeepSpeed 0.19.8 writes it")
    return values[name]


# --- from parts to parameters


def _shapes(given: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in given.items()}


def _frozen(models: Sequence[Mapping[str, Any]], stage: int) -> dict[str, Tensor]:
    shapes = _shapes(models[0].get("frozen_param_shapes") or {})
    parts = [model.get("frozen_param_fragments") or {} for model in models[: None if stage == 3 else 1]]
    lost = [name for name in shapes if not all(name in of_rank for of_rank in parts)]
    if lost:
        raise CheckpointError(f"the checkpoint lacks a part of the frozen {lost[0]}; copy the whole folder again")
    return {name: _shaped(name, [p[name].reshape(-1) for p in parts], shape) for name, shape in shapes.items()}


def _of_groups(ranks: Sequence[_Rank], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Stages 1 and 2."""
    found: dict[str, Tensor] = {}
    every = model["param_shapes"]
    if len(every) != len(ranks[0].groups):
        raise CheckpointError(
            f"{ranks[0].path} has {len(ranks[0].groups)} groups of weights and the model's file names of {len(every)}"
        )
    paddings = ranks[0].paddings
    for number, shapes in enumerate(every):
        flat = torch.cat([rank.groups[number] for rank in ranks])
        start = 0
        for place, (name, shape) in enumerate(_shapes(shapes).items()):
            found[name] = _shaped(name, [flat[start : start + prod(shape)]], shape)
            start += prod(shape) + (paddings[number][place] if paddings else 0)
        _require_used(ranks[0].path.parent, start, flat.numel(), 2 * len(ranks))
    return found


def _of_parameters(ranks: Sequence[_Rank], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Stage 3. A parameter may lie across two of a rank's groups."""
    flat = [torch.cat(rank.groups) if len(rank.groups) > 1 else rank.groups[0] for rank in ranks]
    found: dict[str, Tensor] = {}
    start = 0
    for name, shape in _shapes({k: v for group in model["param_shapes"] for k, v in group.items()}).items():
        each = -(-prod(shape) // len(ranks))
        found[name] = _shaped(name, [of_rank[start : start + each] for of_rank in flat], shape)
        start += each
    _require_used(ranks[0].path.parent, start, flat[0].numel(), 1)
    return found


def _shaped(name: str, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    flat = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if flat.numel() < prod(shape):
        raise CheckpointError(
            f"the checkpoint has {flat.numel()} of the {prod(shape)} elements of {name}; its files are of different "
            "saves or incomplete; copy the whole folder again"
        )
    return flat[: prod(shape)].view(shape)


def _require_used(folder: Path, used: int, there: int, filled_up_to: int) -> None:
    if not 0 <= there - used < filled_up_to:
        raise CheckpointError(
            f"the parameters of {folder} have {used} elements and its fp32 weights {there}; its files are of different "
            "saves or incomplete; copy the whole folder again"
        )
