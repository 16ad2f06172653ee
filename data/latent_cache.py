"""A folder of cached latents of images with their text embeddings, classes and sizes, read by row.

``cache.json`` says what was encoded and how (:class:`Plan`); ``shard-00000.safetensors`` and so on hold the rows of one
bucket each. A shard names the plan and the VAE that it belongs to, with the latents' scale and shift, and has a
checksum for each row, compared whenever the row is read. Which shards there are does not depend on who wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import xxhash
from safetensors import SafetensorError, safe_open

from megatron_ds.data import noise
from megatron_ds.errors import DataError
from megatron_ds.files import check_regular, checksum, parse_json, read_json, replacing

VERSION = 1
PLAN, EMPTY = "cache.json", "empty.safetensors"
SUMS, _META = "row_xxh3", "megatron_ds"
Arrays = dict[str, npt.NDArray]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


@dataclass(frozen=True)
class Plan:
    """What a cache is made of: JSON values, the same for every number of ranks."""

    values: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(self.values, sort_keys=True).encode())

    def write(self, folder: Path) -> None:
        with replacing(folder / PLAN) as temporary:
            temporary.write_text(json.dumps({"xxh3": self.digest, "plan": self.values}, indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Plan:
        path = folder / PLAN
        try:
            content = read_json(path)
            plan = Plan(content["plan"])
            if content["xxh3"] != plan.digest or plan.values["version"] != VERSION:
                raise ValueError("it does not match its checksum, or is of another version")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{path} is missing or damaged ({error}); write the cache with tools/cache_latents.py"
            ) from None
        return plan


@dataclass(frozen=True)
class Shard:
    """An open shard: its rows' checksums, and what its header says of it."""

    path: Path
    file: Any
    sums: npt.NDArray[np.uint64]
    fields: tuple[str, ...]
    bucket: tuple[int, int]
    bad: tuple[tuple[int, str], ...]

    @staticmethod
    def open(path: Path, plan: Plan) -> Shard:
        """Open and check all but the rows.

        Raises:
            DataError: it is missing, damaged, or of another plan.
        """
        try:
            check_regular(path)
            file = safe_open(path, "np")
            meta = parse_json(file.metadata()[_META])
            sums, fields = file.get_tensor(SUMS), tuple(sorted(set(file.keys()) - {SUMS}))
            shapes = {name: file.get_slice(name).get_shape() for name in fields}
            if meta["plan"] != plan.digest:
                raise DataError(
                    f"{path} belongs to another cache: of images, settings or encoders that are not those of {PLAN} "
                    f"beside it (its VAE is {meta['vae']['weights']}, scale {meta['scale']}, shift {meta['shift']}); "
                    "remove it and run tools/cache_latents.py again"
                )
            if meta["sums"] != checksum(sums.tobytes()) or any(shape[0] != len(sums) for shape in shapes.values()):
                raise ValueError("its checksums do not match")
            bad = tuple((int(row), str(why)) for row, why in meta["bad"])
            _, _, height, width = shapes.get("latents", (0, 0, 0, 0))
            return Shard(path, file, sums, fields, (height, width), bad)
        except FileNotFoundError:
            raise DataError(
                f"{path} is missing: the cache is not finished; run the same command of tools/cache_latents.py again"
            ) from None
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise DataError(f"{path} is damaged: {error}; {_AGAIN}") from None

    def row(self, number: int) -> Arrays:
        """The fields of one row, as stored."""
        found = {name: self.file.get_slice(name)[number : number + 1] for name in self.fields}
        if _row_sum(found) != int(self.sums[number]):
            raise DataError(f"{self.path} is damaged: row {number} does not match its checksum; {_AGAIN}")
        return found


_AGAIN = "run the same command of tools/cache_latents.py again, which makes damaged shards anew"


def _row_sum(row: Arrays) -> int:
    digest = xxhash.xxh3_64()
    for name in sorted(row):
        digest.update(np.ascontiguousarray(row[name]).view(np.uint8).data)
    return digest.intdigest()


def write_shard(path: Path, plan: Plan, arrays: Arrays, bad: list[tuple[int, str]]) -> None:
    """``arrays``: rows along dim 0; ``bad``: rows of the source that were left out, and why."""
    # safetensors writes the memory of an array in whatever order it lies, and a batch of one may be channels-last.
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    rows = len(next(iter(arrays.values())))
    sums = np.array([_row_sum({name: a[i : i + 1] for name, a in arrays.items()}) for i in range(rows)], np.uint64)
    values = plan.values
    meta = {
        "plan": plan.digest,
        "vae": values["vae"],
        "scale": values["scale"],
        "shift": values["shift"],
        "sums": checksum(sums.tobytes()),
        "bad": bad,
    }
    # One entry: the order of several is that of a hash table, and files are compared by their bytes.
    content = safetensors.numpy.save({**arrays, SUMS: sums}, {_META: json.dumps(meta, sort_keys=True)})
    with replacing(path) as temporary:
        temporary.write_bytes(content)


class LatentCache:
    """The rows of a finished cache.

    Attributes:
        fields: of ``latents``, ``latents_std``, ``text``, ``pooled``, ``labels``, ``original_size``,
            ``crop_top_left`` and ``target_size`` those that a row has.
        buckets: (height, width) of latents to the rows that have them, int64.
        scale, shift: what a model is trained on is ``(latent - shift) * scale`` of the VAE's latent.
        encoder: identity of the VAE. settings: that the images were encoded with, by name.
        texts: how texts were encoded, for :func:`~megatron_ds.data.latent_encoders.encode_prompts`; None without.
        identity: what tells the cache's content from any other, as JSON values.
        bad: rows of the source that are left out, and why.

    Raises:
        DataError: a shard or the plan is missing, damaged, or of another cache.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        plan = Plan.read(self.folder)
        values = plan.values
        self._shards = [Shard.open(self.folder / shard_name(n), plan) for n in range(values["shards"])]
        self._starts = np.concatenate([[0], np.cumsum([len(shard.sums) for shard in self._shards])]).astype(np.int64)
        self.scale, self.shift = float(values["scale"]), float(values["shift"])
        self.encoder: dict[str, Any] = values["vae"]
        settings = self.settings = values["settings"]
        how = {"states": settings["text_states"], "tokens": settings.get("text_tokens")}
        self.texts: dict[str, Any] | None = {"encoders": values["text"], **how} if values["text"] else None
        self.classes: tuple[str, ...] = tuple(values["classes"])
        self.bad = tuple(line for shard in self._shards for line in shard.bad)
        self._plan = plan
        if not len(self):
            raise DataError(f"{folder} holds no row: no image could be decoded")
        self.fields = next(shard.fields for shard in self._shards if len(shard.sums))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def buckets(self) -> dict[tuple[int, int], npt.NDArray[np.int64]]:
        found: dict[tuple[int, int], list[npt.NDArray[np.int64]]] = {}
        for shard, start, stop in zip(self._shards, self._starts, self._starts[1:]):
            if stop > start:
                found.setdefault(shard.bucket, []).append(np.arange(start, stop, dtype=np.int64))
        return {bucket: np.concatenate(found[bucket]) for bucket in sorted(found)}

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """Of every row, without a look at the rest of them."""
        return np.concatenate([shard.file.get_tensor("labels") for shard in self._shards if len(shard.sums)])

    @cached_property
    def identity(self) -> dict[str, Any]:
        content = xxhash.xxh3_128()
        for shard in self._shards:
            content.update(shard.sums.tobytes())
        return {"images": "latents", "number": len(self), "plan": self._plan.digest, "rows": content.hexdigest()}

    def rows(self, indices: npt.ArrayLike) -> Arrays:
        """The rows of one bucket, each field with a first dim ``b``.

        ``latents`` float32 ``[b, c, h, w]`` are scaled, the mean of the VAE's distribution, and ``latents_std`` its
        scaled standard deviation; ``text`` float32 ``[b, tokens, channels]``, ``pooled`` ``[b, channels]``; ``labels``
        int64 ``[b]``; ``original_size``, ``crop_top_left`` and ``target_size`` int64 ``[b, 2]`` in pixels, vertical
        first.

        Raises:
            DataError: rows of several buckets or none of the cache's; damage.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise DataError(f"rows {wanted.min()} to {wanted.max()} of a cache of {len(self)}")
        places = np.searchsorted(self._starts, wanted, side="right") - 1
        shards = [self._shards[place] for place in places.tolist()]
        if len({shard.bucket for shard in shards}) != 1:
            raise DataError(f"rows of {len({s.bucket for s in shards})} buckets of {self.folder}; a batch is of one")
        found = [s.row(row) for s, row in zip(shards, (wanted - self._starts[places]).tolist())]
        return self._scaled({name: np.concatenate([row[name] for row in found]) for name in self.fields})

    def _scaled(self, row: Arrays) -> Arrays:
        arrays = {name: a.astype(np.float32) if a.dtype.kind == "f" else a for name, a in row.items()}
        arrays["latents"] = (arrays["latents"] - np.float32(self.shift)) * np.float32(self.scale)
        if "latents_std" in arrays:
            arrays["latents_std"] = arrays["latents_std"] * np.float32(self.scale)
        return arrays

    @cached_property
    def empty(self) -> Arrays:
        """``text`` and ``pooled`` of the empty text, with a first dim 1: what guidance needs. Empty without text."""
        if self.texts is None:
            return {}
        found = Shard.open(self.folder / EMPTY, self._plan).row(0)
        return {name: array.astype(np.float32) for name, array in found.items()}


def sample_latents(rows: Arrays, seed: int, indices: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Latents drawn from the VAE's distribution, anew for each sample: a function of (seed, index); the mean where the
    cache has no standard deviation."""
    latents: npt.NDArray[np.float32] = rows["latents"]
    if "latents_std" not in rows:
        return latents
    spread: npt.NDArray[np.float32] = rows["latents_std"]
    return latents + spread * noise.normal(seed, noise.LATENT, indices, latents.shape[1:])
