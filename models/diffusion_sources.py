"""Opens what a diffusion model is trained on, and compares it with the model before a step is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.config.diffusion import DiffusionRun, image_faults
from megatron_ds.data.aspect_buckets import Size, bucket_rows, make_buckets
from megatron_ds.data.image_samples import (
    Augmentation,
    DecodedImages,
    DiffusionSamples,
    Digits,
    Images,
    LatentImages,
    SyntheticImages,
    SyntheticTexts,
    split_rows,
)
from megatron_ds.data.image_source import open_images
from megatron_ds.data.latent_cache import LatentCache
from megatron_ds.data.samples import LATENTS, Sources
from megatron_ds.errors import ConfigError, DataError


def open_diffusion_sources(config: DiffusionRun) -> Sources:
    """Images, or latents, with their noise and what the model is told.

    Raises:
        DataError: images that cannot be read or decoded, without classes or captions, or with one class alone.
        ConfigError: a size or a class that the model does not have.
    """
    data, m = config.data, config.model
    fields = ("text", "pooled") if m.has_text else ("labels",)
    if data.source == "digits":
        train, valid = Digits(data.valid), Digits(0, data.valid) if data.valid else None
        return _sources(config, train, valid, {"images": "digits", "number": sum(map(len, train.buckets.values()))})
    if data.source == "synthetic":
        shape = (m.channels, m.image_size, m.image_size)
        made_up = SyntheticImages(shape, m.num_classes)
        if m.has_text:
            made_up = SyntheticTexts(shape, (m.text_tokens, m.text_size), m.pooled_size)
        return _sources(config, made_up, None, {"images": "synthetic"})
    return _cached(config, fields) if data.source == "latents" else _decoded(config, fields)


def _cached(config: DiffusionRun, fields: Sequence[str]) -> Sources:
    data, m = config.data, config.model
    cache = LatentCache(str(data.path))
    channels = cache.rows([0])["latents"].shape[1]
    if channels != m.channels:
        raise ConfigError(f"{data.path} has latents of {channels} channels, not model.channels={m.channels}")
    every = np.arange(len(cache))
    train, valid = split_rows(every, data.valid)
    images = LatentImages(cache, config.seed, fields, train)
    kept = LatentImages(cache, config.seed, fields, valid) if data.valid else None
    notes = [f"{data.path}: {len(cache.bad)} images could not be decoded and are not in it"] if cache.bad else []
    if "labels" in fields:
        notes += _check_labels(config, cache.labels)
    else:
        _check_texts(config, images.empty)
    latents = {"scale": cache.scale, "shift": cache.shift, "vae": cache.encoder}
    if "text" in fields:
        latents["texts"] = cache.texts
    identity = {**cache.identity, LATENTS: latents, "valid": data.valid}
    return _sources(config, images, kept, identity, notes)


def _decoded(config: DiffusionRun, fields: Sequence[str]) -> Sources:
    data, m = config.data, config.model
    path, keep_in = Path(str(data.path)), None if data.cache_dir is None else Path(data.cache_dir)
    kind: Any = data.source
    source = open_images(path, kind, keep_in)
    if "labels" not in fields:
        raise ConfigError(
            f"data.source={data.source!r}: texts are encoded once, by tools/cache_latents.py; train on data.source="
            "'latents'"
        )
    if source.labels is None and m.num_classes == 1:
        source.labels = np.zeros(len(source), np.int64)
    if source.labels is None:
        raise DataError(
            f"{path} has no classes: put the images of each class into a subfolder of its own, give tars key.cls, or a "
            "set a column `label`; with captions, encode them by tools/cache_latents.py; model.num_classes=1 trains "
            "without classes"
        )
    notes = _check_labels(config, source.labels)
    rows, sizes = source.usable_rows(data.on_error), source.sizes
    buckets: Sequence[Size] = ((m.image_size, m.image_size),)
    if data.max_ratio > 1:
        buckets = make_buckets(m.image_size, data.bucket_step, data.max_ratio)
    augmentation = Augmentation(data.crop, data.flip, data.on_error, data.workers)
    train, valid = (
        DecodedImages(source, bucket_rows(part, sizes[part], buckets), augmentation, config.seed, m.channels)
        if len(part)
        else None
        for part in split_rows(rows, data.valid)
    )
    assert train is not None
    identity = {**source.identity, "valid": data.valid, "crop": data.crop, "flip": data.flip}
    if len(rows) < len(source):
        first = source.name(int(np.flatnonzero(sizes[:, 0] == 0)[0]))
        left_out = f"{len(source) - len(rows)} of {len(source)} files"
        notes.append(f"{path}: {left_out} are no images, or cut off, and are left out, {first} first")
    return _sources(config, train, valid, identity, notes)


def _sources(
    config: DiffusionRun,
    train: Images,
    valid: Images | None,
    identity: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Sources:
    c, tp = config, config.mesh.tp
    sizes = train.buckets.keys() | (valid.buckets.keys() if valid is not None else set())
    if faults := [fault for height, width in sorted(sizes) for fault in image_faults(c, height, width, tp)]:
        raise ConfigError("; ".join(faults))
    if len(sizes) == 1 and (found := next(iter(sizes))) != (c.model.image_size,) * 2:
        raise ConfigError(
            f"{c.data.path} has images of {found[0]} x {found[1]} alone; use model.image_size={max(found)}, or other "
            "images"
        )
    block = c.data.bucket_batch or c.train.global_batch
    dropout = c.objective.condition_dropout
    samples = DiffusionSamples(train, c.seed, c.model.num_classes, dropout, block)
    kept = None
    if valid is not None:
        largest = max(map(len, valid.buckets.values()))
        if len(valid.buckets) > 1 and largest < c.train.micro_batch:
            raise DataError(
                f"data.valid={c.data.valid}: no bucket keeps the {c.train.micro_batch} images of train.micro_batch for "
                f"validation, {largest} at most; keep more of them, or none with data.valid=0"
            )
        kept = DiffusionSamples(valid, c.seed, c.model.num_classes, dropout, c.train.micro_batch)
    said = [*notes, *_bucket_notes(train, samples, block)]
    if len(train.buckets) > 1:
        identity = {**identity, "buckets": [f"{h} x {w}" for h, w in train.buckets], "bucket_batch": block}
    return Sources(samples, kept, notes=tuple(said), identity=identity)


def _bucket_notes(images: Images, samples: DiffusionSamples, block: int) -> list[str]:
    sizes = list(images.buckets)
    if len(sizes) == 1:
        return []
    counts = ", ".join(f"{len(rows)} of {h} x {w}" for (h, w), rows in images.buckets.items())
    notes = [f"images in {len(sizes)} buckets (height x width): {counts}"]
    if left_out := samples.order.left_out:
        notes.append(f"{left_out} of them are left out of each epoch, where a bucket does not fill {block} in a row")
    if unused := [f"{sizes[place][0]} x {sizes[place][1]}" for place in samples.order.unused]:
        notes.append(
            f"buckets {', '.join(unused)} have fewer than {block} images and are never seen; a smaller "
            "data.bucket_batch sees them"
        )
    return notes


def _check_texts(config: DiffusionRun, empty: Mapping[str, npt.NDArray[Any]]) -> None:
    m = config.model
    for name, size in (("text", (m.text_tokens, m.text_size)), ("pooled", (m.pooled_size,))):
        found = empty[name].shape[1:]
        if found != size:
            setting = "model.text_tokens and model.text_size" if name == "text" else "model.pooled_size"
            raise ConfigError(
                f"{config.data.path}: {name!r} is {list(found)} a sample, not {list(size)}; set {setting}"
            )


def _check_labels(config: DiffusionRun, labels: npt.NDArray[np.int64]) -> list[str]:
    """Compare the classes of the data with the model's.

    Returns:
        A note where the model has more than these: images drawn of the others are of a class that it never saw.

    Raises:
        ConfigError, DataError: the model cannot be trained on them.
    """
    known = config.model.num_classes
    if not (labels.min() >= 0 and labels.max() < known):
        wrong = int(labels.max()) if labels.max() >= known else int(labels.min())
        raise ConfigError(
            f"{config.data.path} has class {wrong}, and model.num_classes={known} are numbered 0 to {known - 1}; use "
            f"model.num_classes={max(wrong + 1, known)} or more, and labels from 0"
        )
    if known > 1 and len(np.unique(labels)) < 2:
        raise DataError(
            f"all images of {config.data.path} are of one class; put those of each class into a subfolder of its own, "
            "or set model.num_classes=1 to train without classes"
        )
    count = int(labels.max()) + 1
    return [f"model.num_classes={known}, of which {config.data.path} has {count}"] if count < known else []
