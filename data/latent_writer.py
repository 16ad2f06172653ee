"""Writes a cache of latents: every rank encodes its share of the shards, each with its own batch size.

The plan cuts the images into shards by bucket and row before anything is encoded, and a batch never crosses a shard:
what a rounding of the encoder depends on (which images are in a batch, and how many) is the same for every number of
ranks, and so are the bytes. A run after a kill keeps the shards that are there and whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from megatron_ds.data.aspect_buckets import Size, bucket_rows, make_buckets
from megatron_ds.data.cache import first_difference
from megatron_ds.data.image_samples import Augmentation
from megatron_ds.data.image_source import ImageSource, OnError
from megatron_ds.data.image_transforms import Pixels, UndecodableImage
from megatron_ds.data.latent_cache import EMPTY, PLAN, VERSION, Arrays, Plan, Shard, shard_name, write_shard
from megatron_ds.data.latent_encoders import (
    EncoderFolders,
    ImageEncoder,
    TextEncoder,
    TextStates,
    VaeConfig,
    is_t5,
    model_identity,
    text_identities,
)
from megatron_ds.errors import DataError, multiples_around

DType = Literal["float32", "bfloat16", "float16"]
Encoders = tuple[ImageEncoder, TextEncoder | None]
T = TypeVar("T")
_SHOWN = 20
BROKEN, NO_IMAGES = "which cannot be decoded to their end", "which are no images, or cut off"
"""Why images are left out."""


@dataclass(frozen=True)
class CacheSettings:
    """What a cache depends on besides the images and the encoders."""

    resolution: int
    """Height and width in pixels, or of the square with as many pixels as the buckets have at most."""
    bucket_step: int = 64
    """Heights and widths are multiples of this."""
    max_ratio: float = 1.0
    """Longest side by shortest of the aspect-ratio buckets; 1: squares alone."""
    crop: Literal["centre", "random"] = "centre"
    """Where, or anywhere by --seed and the image's row."""
    flip: bool = False
    """Mirror half of the images, by --seed and the image's row."""
    seed: int = 0
    batch: int = 8
    """Images that a rank encodes at once."""
    shard_rows: int = 256
    """Images in a file, at most."""
    dtype: DType = "float32"
    """In which encoders compute. Many VAEs overflow in float16, SDXL's first one among them: that is an error."""
    store: Literal["float32", "float16"] = "float32"
    """In which results are kept."""
    spread: bool = True
    """Keep the standard deviation of latents beside their mean, so that each epoch can draw others."""
    text_states: TextStates | None = None
    """CLIP's hidden states before the last layer or after it. Default: penultimate for several encoders, last for
    one."""
    text_tokens: int | None = None
    """Tokens of a text that T5 sees. Default: 256, or fewer where its tokenizer says so."""
    on_error: OnError = "skip"
    """Leave out and count images that cannot be decoded, or end at the first."""

    def for_encoders(self, count: int) -> CacheSettings:
        """With the hidden states that so many text encoders are asked for."""
        for name, value in (("batch", self.batch), ("shard-rows", self.shard_rows), ("text-tokens", self.text_tokens)):
            if value is not None and value < 1:
                raise DataError(f"--{name} {value}: use 1 or more")
        return replace(self, text_states=self.text_states or ("penultimate" if count > 1 else "last"))


@dataclass(frozen=True)
class ShardRows:
    """Rows of the source, int64, in one bucket."""

    number: int
    bucket: Size
    rows: npt.NDArray[np.int64]


class CacheWriter:
    """A cache that is to be written, the same on every rank.

    Raises:
        DataError: no image that can be used, encoders that cannot, or a folder that holds another cache.
    """

    def __init__(
        self,
        source: ImageSource,
        encoders: EncoderFolders,
        settings: CacheSettings,
        folder: Path,
    ):
        if encoders.text and not source.captioned:
            raise DataError("the images have no captions to encode; write them beside the images, or give no encoder")
        settings = settings.for_encoders(len(encoders.text))
        if settings.text_tokens is not None and not any(map(is_t5, encoders.text)):
            raise DataError(
                f"--text-tokens {settings.text_tokens} is of T5's texts, and no encoder is a T5; leave it out"
            )
        assert encoders.vae is not None
        self._vae = encoders.vae
        vae = VaeConfig.read(self._vae)
        if settings.bucket_step % vae.factor:
            raise DataError(
                f"--bucket-step {settings.bucket_step}: the VAE makes one of {vae.factor} pixels; use "
                f"{multiples_around(settings.bucket_step, vae.factor)}"
            )
        self._source, self._encoders, self._settings, self.folder = source, encoders, settings, folder
        self._loaded: Encoders | None = None
        buckets = make_buckets(settings.resolution, settings.bucket_step, settings.max_ratio)
        rows, sizes = source.usable_rows(settings.on_error), source.sizes
        self.unreadable = [source.name(row) for row in np.flatnonzero(sizes[:, 0] == 0).tolist()]
        self.shards = list(_cut(bucket_rows(rows, sizes[rows], buckets), settings.shard_rows))
        self.plan = Plan(
            {
                "version": VERSION,
                "source": dict(source.identity),
                "classes": list(source.classes),
                "settings": asdict(settings),
                "vae": model_identity(self._vae),
                "text": text_identities(encoders),
                "scale": vae.scale,
                "shift": vae.shift,
                "shards": len(self.shards),
            }
        )
        if (folder / PLAN).exists() and (difference := first_difference(Plan.read(folder).values, self.plan.values)):
            raise DataError(
                f"{folder} holds a cache of other images, settings or encoders: {difference}. Restore them to continue "
                "it, or write into another folder"
            )

    def begin(self) -> None:
        """Makes the folder and says in it what will be there; for one rank."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.plan.write(self.folder)

    def write(self, rank: int, world_size: int, device: torch.device, show_progress: bool = False) -> list[str]:
        """Write this rank's share of the shards that are not there yet, whole; a line for each image left out of it.

        Raises:
            DataError: a latent or an embedding that is not finite, or an image that cannot be decoded.
        """
        return [line for lines in self.rounds(rank, world_size, device, show_progress) for line in lines]

    def rounds(
        self, rank: int, world_size: int, device: torch.device, show_progress: bool = False
    ) -> Iterator[list[str]]:
        """:meth:`write`, a shard at a time: as many steps on every rank. Rank 0 also writes the empty text.

        ``show_progress``: a bar with images/s and the time left of this rank's share, which is like the others'.
        """
        from tqdm import tqdm

        if rank == 0 and self._encoders.text and self._whole(EMPTY) is None:
            _, texts = self._load_encoders(device)
            assert texts is not None
            arrays = _storable(texts.encode([""]), self._settings, ["the empty text"])
            write_shard(self.folder / EMPTY, self.plan, arrays, [])
        share = self.shards[rank::world_size]
        total = sum(len(shard.rows) for shard in share)
        bar = tqdm(total=total, unit="image", desc="encode", smoothing=0.05, disable=not show_progress)
        with bar, ThreadPoolExecutor() as pool:
            for number in range(-(-len(self.shards) // world_size)):
                bad: Sequence[tuple[int, str]] = ()
                for shard in share[number : number + 1]:
                    if (done := self._whole(shard_name(shard.number))) is None:
                        bad = self._write(shard, self._load_encoders(device), pool, bar)
                    else:
                        bad = done.bad
                        bar.total -= len(shard.rows)
                        bar.refresh()
                yield [f"{self._source.name(row)}: {why}" for row, why in bad]

    def _load_encoders(self, device: torch.device) -> Encoders:
        if self._loaded is None:
            s, folders = self._settings, self._encoders
            dtype, texts = getattr(torch, s.dtype), None
            if folders.text and s.text_states is not None:
                texts = TextEncoder(folders, s.text_states, s.text_tokens, device, dtype)
            self._loaded = ImageEncoder(self._vae, device, dtype), texts
        return self._loaded

    def _whole(self, name: str) -> Shard | None:
        """A shard that is there and undamaged."""
        try:
            shard = Shard.open(self.folder / name, self.plan)
            for row in range(len(shard.sums)):  # each is compared with its checksum
                shard.row(row)
        except DataError:
            return None
        return shard

    def _write(self, shard: ShardRows, encoders: Encoders, pool: ThreadPoolExecutor, bar: Any) -> list[tuple[int, str]]:
        s = self._settings
        augmentation = Augmentation(s.crop, s.flip, s.on_error)
        batches = [shard.rows[start : start + s.batch].tolist() for start in range(0, len(shard.rows), s.batch)]
        parts: list[Arrays] = []
        bad: list[tuple[int, str]] = []

        def load(row: int) -> Pixels | UndecodableImage:
            return augmentation.load(self._source, row, shard.bucket, s.seed, row)

        for rows, loaded in zip(batches, _ahead(pool, load, batches)):
            bad += [(row, str(image)) for row, image in zip(rows, loaded) if not isinstance(image, Pixels)]
            good = [(row, image) for row, image in zip(rows, loaded) if isinstance(image, Pixels)]
            if good:
                parts.append(self._encode(good, shard.bucket, encoders))
            bar.update(len(rows))
        arrays: Arrays = {"latents": np.zeros((0, 1, 1, 1), np.float32)}
        if parts:
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        write_shard(self.folder / shard_name(shard.number), self.plan, arrays, bad)
        return bad

    def _encode(self, images: list[tuple[int, Pixels]], bucket: Size, encoders: Encoders) -> Arrays:
        rows, names = [row for row, _ in images], [self._source.name(row) for row, _ in images]
        pixels, texts = encoders
        mean, std = pixels.encode(np.stack([image.values for _, image in images]))
        arrays = {"latents": mean, "latents_std": std} if self._settings.spread else {"latents": mean}
        if texts is not None:
            arrays |= texts.encode([self._source.caption(row) for row in rows])
        found: Arrays = _storable({**arrays}, self._settings, names)
        if self._source.labels is not None:
            found["labels"] = self._source.labels[rows]
        found["original_size"] = np.array([image.original_size for _, image in images], np.int64)
        found["crop_top_left"] = np.array([image.crop_top_left for _, image in images], np.int64)
        found["target_size"] = np.array([bucket] * len(images), np.int64)
        return found


def _storable(arrays: Arrays, settings: CacheSettings, names: Sequence[str]) -> Arrays:
    """Results of encoders in the dtype that is kept, and finite. ``names`` of their rows are for errors."""
    for name, array in arrays.items():
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            raise DataError(
                f"{name} of {names[int(finite.argmin())]} are not finite: the encoder overflows in {settings.dtype}; "
                f"use --dtype {'bfloat16 or ' * (settings.dtype == 'float16')}float32"
            )
        with np.errstate(over="ignore"):
            arrays[name] = array.astype(settings.store)
        if not np.isfinite(arrays[name]).all():
            raise DataError(f"{name} are up to {np.abs(array).max():.3g}: too much for --store float16; use float32")
    return arrays


def left_out(what: str, images: Sequence[str]) -> str:
    """How many images are not in a cache, and the first of them by name; empty where all are."""
    if not images:
        return ""
    more = [f"and {len(images) - _SHOWN} more"] if len(images) > _SHOWN else []
    return "\n  ".join([f"left out {len(images)}, {what}:", *images[:_SHOWN], *more]) + "\n"


def _cut(buckets: Mapping[Size, npt.NDArray[np.int64]], shard_rows: int) -> Iterator[ShardRows]:
    parts = [(b, rows[i : i + shard_rows]) for b, rows in buckets.items() for i in range(0, len(rows), shard_rows)]
    return (ShardRows(number, bucket, rows) for number, (bucket, rows) in enumerate(parts))


def _ahead(pool: ThreadPoolExecutor, load: Callable[[int], T], batches: Iterable[list[int]]) -> Iterator[list[T]]:
    """Each batch loaded by the pool's threads, at most two batches ahead of need."""
    waiting: list[Any] = []
    for batch in batches:
        waiting.append([pool.submit(load, row) for row in batch])
        if len(waiting) > 2:
            yield [future.result() for future in waiting.pop(0)]
    for futures in waiting:
        yield [future.result() for future in futures]
