"""The `data` section of a run that trains on images: where they come from, and how they get their size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from megatron_ds.config.schema import BaseDataConfig
from megatron_ds.config.unused import Unused

STORED = ("folder", "tar", "dataset", "latents")
_DECODED = STORED[:3]


class DiffusionDataConfig(BaseDataConfig):
    """Where the images come from."""

    source: Literal["digits", "synthetic", "folder", "tar", "dataset", "latents"] = Field(
        "synthetic",
        description="scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, noise for measuring speed, a folder of "
        "images with a class a subfolder, tar shards (key.jpg, key.cls), an image set of `datasets` on disk, or what "
        "tools/cache_latents.py wrote.",
    )
    path: str | None = Field(None, description="Of the folder, tars, image set or cache of latents.")
    cache_dir: str | None = Field(
        None,
        description="Folder for indices of images, instead of beside them (they are kept in ~/.cache if neither can "
        "be written).",
    )
    valid: int = Field(
        128, ge=0, description="Images kept for validation; of a folder, tars, a set or a cache spread over it."
    )
    max_ratio: float = Field(
        1.0,
        ge=1,
        description="Longest side by shortest of the aspect-ratio buckets that images of files are sorted into, each "
        "with at most the pixels of model.image_size squared; 1: squares alone.",
    )
    bucket_step: int = Field(64, gt=0, description="Heights and widths of buckets are multiples of this.")
    bucket_batch: int | None = Field(
        None,
        gt=0,
        description="Samples in a row of one bucket, a multiple of train.micro_batch. Default: a global batch.",
    )
    crop: Literal["centre", "random"] = Field("centre", description="Which part of an image is kept that is too long.")
    flip: bool = Field(False, description="Mirror half of the samples.")
    on_error: Literal["skip", "fail"] = Field(
        "fail", description="An image that cannot be decoded is named and left out, or ends the run."
    )
    workers: int | None = Field(None, gt=0, description="Threads of a rank that decode. Default: one a core.")


UNUSED = (
    Unused(
        ("data.valid",),
        lambda c: c.data.source != "synthetic",
        "data.source={c.data.source!r} has no end",
    ),
    Unused(("data.path",), lambda c: c.data.source in STORED, "data.source={c.data.source!r} is no place on a disk"),
    Unused(
        ("data.bucket_batch",),
        lambda c: c.data.source in STORED,
        "images of data.source={c.data.source!r} have one size",
    ),
    Unused(
        tuple(f"data.{name}" for name in ("cache_dir", "max_ratio", "crop", "flip", "on_error", "workers")),
        lambda c: c.data.source in _DECODED,
        "data.source={c.data.source!r} decodes no images (of latents, tools/cache_latents.py has such settings)",
    ),
    Unused(
        ("data.bucket_step",),
        lambda c: c.data.source in _DECODED and c.data.max_ratio > 1,
        "squares alone are trained on; set data.max_ratio above 1",
    ),
)


def image_data_faults(run: Any) -> Iterator[str]:
    """What does not fit together in the section, or with the model that is trained."""
    data, m, micro_batch = run.data, run.model, run.train.micro_batch
    if data.source in STORED and not data.path:
        yield f"data.source={data.source!r} without data.path; say where it is"
    if data.source in _DECODED and m.channels not in (1, 3):
        yield (
            f"model.channels={m.channels}: images of data.source={data.source!r} have 1 or 3; latents of 4 come from "
            "tools/cache_latents.py"
        )
    if data.bucket_batch is not None and data.bucket_batch % micro_batch:
        yield (
            f"data.bucket_batch={data.bucket_batch} is not a multiple of train.micro_batch={micro_batch}: a forward "
            "pass would have images of two sizes"
        )
    if data.max_ratio > 1 and m.image_size % data.bucket_step:
        yield (
            f"model.image_size={m.image_size} is not a multiple of data.bucket_step={data.bucket_step}; use a smaller "
            "step, a multiple of model.patch_size"
        )
    if data.source == "digits" and (m.image_size, m.channels) != (8, 1):
        yield (
            f"data.source='digits' has images of 8 x 8 x 1, not model.image_size={m.image_size} and "
            f"model.channels={m.channels}; use 8 and 1"
        )
    if data.source == "digits" and m.num_classes < 10:
        yield f"model.num_classes={m.num_classes} is less than the 10 of data.source='digits'; use 10"
