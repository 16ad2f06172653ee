"""Training in FP8 reaches the loss of bf16: every recipe on a small Llama and text with something to learn."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from megatron_ds.config import RunConfig, from_dict
from megatron_ds.mesh import Mesh
from megatron_ds.models.families import task_of
from megatron_ds.train.build import build

VOCABULARY, LENGTH, BATCH, STEPS, LAST = 32, 32, 8, 40, 15
WITHIN = 0.005


def batch(step: int) -> dict[str, torch.Tensor]:
    """Half of the tokens follow from the one before, the others are random: the loss falls from 3.5 to about 2.6."""
    chance = np.random.default_rng((7, step))
    rows = chance.integers(VOCABULARY, size=(BATCH, LENGTH + 1))
    for at in range(1, LENGTH + 1):
        follows = chance.random(BATCH) < 0.5
        rows[:, at] = np.where(follows, (5 * rows[:, at - 1] + 3) % VOCABULARY, rows[:, at])
    text = torch.from_numpy(rows)
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "loss_mask": torch.ones(BATCH, LENGTH, dtype=torch.bool),
        "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH),
        "sample_ids": torch.arange(step * BATCH, (step + 1) * BATCH),
    }


@cache
def losses(fp8: str) -> list[float]:
    more = {"fp8": fp8, "fp8_min_features": 0, "fp8_emulate": True} if fp8 != "none" else {}
    config = from_dict(
        RunConfig,
        {
            "model": {
                "num_layers": 1,
                "hidden_size": 64,
                "num_heads": 4,
                "kv_heads": 2,
                "ffn_hidden_size": 128,
                "vocab_size": VOCABULARY,
                "position": "rope",
                "norm": "rmsnorm",
                "activation": "swiglu",
                "bias": False,
                "max_positions": LENGTH,
            },
            "optimizer": {"lr": 1e-2, "warmup_steps": 5},
            "precision": {"dtype": "bf16", **more},
            "data": {"synthetic": True},
            "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": BATCH, "sequence_length": LENGTH},
        },
        "the test",
    )
    mesh = Mesh.single()
    parts = build(config, mesh, task_of(config))
    return [parts.step([batch(step)]).loss for step in range(STEPS)]


@pytest.mark.parametrize("fp8", ["tensorwise", "rowwise", "blockwise"])
def test_the_loss_is_that_of_bf16(fp8: str) -> None:
    plain, ours = (np.array(losses(kind)) for kind in ("none", fp8))
    assert plain[-LAST:].mean() < plain[0] - 1.0, "it learns"
    assert (plain[1:] != ours[1:]).all(), "in other numbers"
    difference = ours[-LAST:].mean() / plain[-LAST:].mean() - 1.0
    assert abs(difference) < WITHIN, f"{difference:+.2%} over the last {LAST} steps"
