"""Load: every rank fills its flat shards from whatever boxes the files hold, so any mesh loads from any mesh."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ds.checkpoint.directory import way_out
from megatron_ds.checkpoint.manifest import Manifest
from megatron_ds.checkpoint.reader import Checkpoint, Request
from megatron_ds.comm.together import exchange, group_device, together
from megatron_ds.errors import CheckpointError, listed
from megatron_ds.mesh import Axis
from megatron_ds.shard.flat_shards import FlatShard, acquired

SHOWN = 10
_SHAPES = "of another shape"
_OF = " of "
_ITS_OWN = "load it with the configuration it was saved with (its meta holds it)"

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    flat_shards: Sequence[FlatShard],
    world: Axis | None = None,
    verify: bool = True,
    strict: bool = True,
    remedy: str = _ITS_OWN,
) -> dict[str, Any]:
    """Fill each flat shard's ``data`` in place from a checkpoint, reading only what the flat shards need.

    Args:
        path: a run's checkpoint directory (its latest is loaded) or one step's directory.
        flat shards: what this rank holds: any cut of any mesh, any float dtype (values are converted), any device.
            Replicas are filled too. Every tensor in the checkpoint of a kind that is asked for must be asked for by
            some rank; kinds that no rank asks for (optimizer state, for evaluation) are left unread.
        world: the ranks that load together; None is one process alone.
        verify: check the checksum of every chunk that is touched.
        strict: whether the names must be the same. If not, flat shards that the checkpoint lacks stay as they are; the
            names that only one of them has are logged by the first rank. Shapes have to be equal all the same.
        remedy: what to do about another model's checkpoint, for the message.

    Returns:
        The ``meta`` that was saved.

    Raises:
        CheckpointError: the same on every rank: missing, incomplete, truncated or damaged files, or another model's
            checkpoint (the names and shapes that differ are listed). The flat shards may be partly filled after damage;
            they are untouched after a mismatch of names or shapes.
    """
    world = world or Axis("world")
    with together(world):
        checkpoint = Checkpoint(path, verify, (world.rank, world.size))
    with checkpoint:
        _require_the_same(checkpoint, world)
        found = differences(checkpoint.manifest, flat_shards, world)
        common = [
            flat_shard
            for flat_shard in flat_shards
            if (flat_shard.kind, flat_shard.name) in checkpoint.manifest.tensors
        ]
        if strict or found[_SHAPES] or not any(exchange(world, "some" if common else "")):
            _require_none(found, checkpoint.directory, remedy)
        else:
            flat_shards = common
            if any(found.values()) and world.is_first:
                log.warning("%s was loaded by name; %s", checkpoint.directory, "; ".join(_lines(found)))
        with together(world):
            try:
                with torch.no_grad():
                    for group, held in acquired(flat_shards, changed=True):
                        checkpoint.fill(_requests(checkpoint, group, held))
            except CheckpointError as error:
                hint = way_out(checkpoint.directory.parent, besides=checkpoint.directory)
                raise CheckpointError(f"{error}{hint}") from error
    return checkpoint.meta


def compare(manifest: Manifest, directory: Path, flat_shards: Sequence[FlatShard], world: Axis | None = None) -> None:
    """One :class:`CheckpointError` on every rank that lists the :func:`differences`, if there are any."""
    _require_none(differences(manifest, flat_shards, world or Axis("world")), directory, _ITS_OWN)


def differences(manifest: Manifest, flat_shards: Sequence[FlatShard], world: Axis) -> dict[str, list[str]]:
    """Names and shapes of all ranks' flat shards against the manifest's: by kind of difference, on every rank alike."""
    keys = list(manifest.tensors)
    place = {key: index for index, key in enumerate(keys)}
    asked = torch.zeros(len(keys) + 1, dtype=torch.int32)
    missing: list[str] = []
    shapes: list[str] = []
    for flat_shard in flat_shards:
        key = (flat_shard.kind, flat_shard.name)
        if key not in place:
            missing.append(_label(*key))
            continue
        asked[place[key]] = 1
        saved = manifest.tensors[key].shape
        if saved != flat_shard.global_shape:
            shapes.append(
                f"{_label(*key)}: {list(saved)} in the checkpoint, {list(flat_shard.global_shape)} in the model"
            )
    if world.group is not None:
        on_device = asked.to(group_device(world))
        dist.all_reduce(on_device, op=dist.ReduceOp.MAX, group=world.group)
        asked = on_device.cpu()
    kinds = {keys[index][0] for index, flag in enumerate(asked[:-1].tolist()) if flag}
    left = [key for key, flag in zip(keys, asked.tolist()) if not flag and key[0] in kinds]
    # Parameters first, by name: the order in the file follows the buckets of the ranks that wrote it.
    unexpected = [_label(*key) for key in sorted(left, key=lambda key: (key[0] != "param", key[1], key[0]))]
    found = [missing[: SHOWN + 1], shapes[: SHOWN + 1]]
    everyone = [json.loads(text) for text in exchange(world, json.dumps(found) if missing or shapes else "") if text]
    return {
        "missing from the checkpoint": _distinct(name for rank in everyone for name in rank[0]),
        "in the checkpoint but not in the model": unexpected,
        _SHAPES: _distinct(text for rank in everyone for text in rank[1]),
    }


def _require_the_same(checkpoint: Checkpoint, world: Axis) -> None:
    """By one path nodes find different checkpoints where they do not share the folder."""
    found = exchange(world, f"step {checkpoint.step} {checkpoint.manifest.checksum}")
    others = [rank for rank, text in enumerate(found) if text != found[0]]
    if others:
        (first, _), (other, _) = (found[rank].rsplit(" ", 1) for rank in (0, others[0]))
        raise CheckpointError(
            f"{checkpoint.directory.parent} holds another checkpoint on rank {listed(others, SHOWN)} ({other}) than on "
            f"rank 0 ({first}); it must be on a filesystem that all nodes share, or a whole copy on each"
        )


def _require_none(found: dict[str, list[str]], directory: Path, remedy: str) -> None:
    if any(found.values()):
        of_state = all(_is_of_state(text) for texts in found.values() for text in texts)
        what = "the state of another optimizer" if of_state else "another model"
        said = [f"{directory} holds {what} than the one being loaded:", *_lines(found), remedy]
        raise CheckpointError("\n  ".join(said))


def _lines(found: dict[str, list[str]]) -> list[str]:
    return [f"{title}: {listed(names, SHOWN)}" for title, names in found.items() if names]


def _requests(checkpoint: Checkpoint, flat_shards: Sequence[FlatShard], held: torch.Tensor | None) -> list[Request]:
    requests = []
    for flat_shard in flat_shards:
        record = checkpoint.record(flat_shard.name, flat_shard.kind)
        requests += [Request(record, box, part) for box, part in flat_shard.parts(held)]
    return requests


def _label(kind: str, name: str) -> str:
    return name if kind == "param" else f"{kind}{_OF}{name}"


def _is_of_state(text: str) -> bool:
    """Whether a text that begins with a label is about an optimizer's state, and not a parameter or a buffer."""
    label = text.partition(":")[0]
    return _OF in label and not label.startswith("buffer")


def _distinct(names: Iterable[str]) -> list[str]:
    return sorted(set(names))
