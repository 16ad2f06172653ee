"""What a diffusion run reads is what its configuration says: every setting of the data reaches the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_images import write_classes

from megatron_ds.config import from_dict
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.data.aspect_buckets import bucket_rows, make_buckets
from megatron_ds.data.image_samples import Augmentation, DecodedImages, DiffusionSamples, Digits, split_rows
from megatron_ds.data.image_source import open_images
from megatron_ds.data.samples import SampleSource
from megatron_ds.models.diffusion_sources import open_diffusion_sources

SEED, DROPOUT = 5, 0.4


def run(model: dict[str, Any], data: dict[str, Any], batches: tuple[int, int]) -> DiffusionRun:
    sizes = {"num_layers": 1, "hidden_size": 24, "num_heads": 3, "patch_size": 2}
    train = {"global_batch": batches[0], "micro_batch": batches[1]}
    values = {"model": sizes | model, "objective": {"condition_dropout": DROPOUT}, "data": data, "train": train}
    return from_dict(DiffusionRun, {**values, "seed": SEED}, "test")


def same_samples(one: SampleSource | None, other: SampleSource, block: int, blocks: int) -> None:
    """As many samples in a row as are of one size."""
    assert one is not None and len(one) == len(other)
    for start in range(0, block * blocks, block):
        places = np.arange(start, start + block)
        for got, want in ((one.batch(places), other.batch(places)), (one.rows(places), other.rows(places))):
            assert got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)


def test_digits() -> None:
    config = run({"image_size": 8, "channels": 1, "num_classes": 10}, {"source": "digits", "valid": 40}, (8, 4))
    found = open_diffusion_sources(config)
    same_samples(found.train, DiffusionSamples(Digits(40), SEED, 10, DROPOUT, 8), 8, 6)
    same_samples(found.valid, DiffusionSamples(Digits(0, 40), SEED, 10, DROPOUT, 4), 4, 6)
    assert len(found.train) == 1797 - 40


@pytest.mark.parametrize("bucket_batch", [2, None])
def test_images_of_several_sizes(tmp_path: Path, bucket_batch: int | None) -> None:
    folder = write_classes(tmp_path / "images")
    data = {"source": "folder", "path": str(folder), "valid": 3, "max_ratio": 2.0, "bucket_step": 8}
    data |= {"crop": "random", "flip": True, "bucket_batch": bucket_batch}
    found = open_diffusion_sources(run({"image_size": 32, "channels": 3, "num_classes": 2}, data, (1, 1)))
    source, buckets = open_images(folder), make_buckets(32, 8, 2.0)
    for samples, rows, block in zip(
        (found.train, found.valid), split_rows(np.arange(10), 3), (bucket_batch or 1, 1), strict=True
    ):
        sorted_in = bucket_rows(rows, source.sizes[rows], buckets)
        assert len(sorted_in) > 1
        images = DecodedImages(source, sorted_in, Augmentation("random", flip=True), SEED, 3)
        same_samples(samples, DiffusionSamples(images, SEED, 2, DROPOUT, block), block, 2)
