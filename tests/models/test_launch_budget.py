"""How many kernels a step launches on one GPU and how many bytes they move: a budget, counted on the meta device.

Whoever changes a step on purpose writes the new numbers here; they may fall, and rise only for a reason.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from launches import Count, counted
from torch import Tensor

from megatron_ds.config import RunConfig, from_dict
from megatron_ds.kernels import registry
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.gpt import GPTTask
from megatron_ds.train.build import build

LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"hidden_size": 768, "num_heads": 12, "vocab_size": 50304, "max_positions": 1024},
    "llama": {"hidden_size": 2048, "num_heads": 16, "vocab_size": 32000, "max_positions": 2048, **LLAMA},
}


TOKENS = 8192  # of a micro-batch: the loss takes them in one chunk


class Run(NamedTuple):
    model: str
    layers: int = 2
    micro_batches: int = 1

    @property
    def sequences(self) -> int:
        return TOKENS // int(MODELS[self.model]["max_positions"])


@cache
def step(run: Run) -> Count:
    """What one step of a training run does."""
    model = {**MODELS[run.model], "num_layers": run.layers}
    train = {"global_batch": run.sequences * run.micro_batches, "micro_batch": run.sequences}
    settings = {
        "output": "nowhere",
        "model": model,
        "precision": {"dtype": "bf16"},
        "train": {**train, "sequence_length": model["max_positions"]},
        "data": {"synthetic": True},
    }
    config = from_dict(RunConfig, settings, "budget")
    with registry.meta_as("cuda"):
        parts = build(config, Mesh.described(MeshShape(), 0), GPTTask(config), torch.device("meta"))
    tokens = torch.empty(run.sequences, model["max_positions"], dtype=torch.long, device="meta")
    batch: dict[str, Tensor] = {
        "tokens": tokens,
        "labels": tokens,
        "position_ids": torch.arange(model["max_positions"], device="meta").expand_as(tokens),
        "loss_mask": torch.ones_like(tokens, dtype=torch.bool),
        "sample_index": torch.arange(run.sequences, device="meta"),
    }
    return counted(lambda: parts.step([batch] * run.micro_batches))


def micro_batch(run: Run) -> Count:
    """One that is not a step's first."""
    return step(run._replace(micro_batches=2)) - step(run)


def of_block(run: Run) -> Count:
    return micro_batch(run._replace(layers=3)) - micro_batch(run)


@pytest.mark.parametrize(("model", "launches", "passes"), [("gpt2", 28, 109.6), ("llama", 27, 124.0)])
def test_a_block(model: str, launches: int, passes: float) -> None:
    """Forward and backward. ``passes``: over an activation ``[s, b, h]``, weights and attention's operands included."""
    count = of_block(Run(model))
    one = 2 * TOKENS * MODELS[model]["hidden_size"]
    assert (count.launches, round(count.bytes / one, 1)) == (launches, passes), count.kernels


@pytest.mark.parametrize(("model", "launches"), [("gpt2", 36), ("llama", 38)])
def test_a_micro_batch_outside_of_its_blocks(model: str, launches: int) -> None:
    """Embedding, last norm and loss."""
    run = Run(model)
    outside = micro_batch(run).launches - run.layers * of_block(run).launches
    assert outside == launches, micro_batch(run).kernels


@pytest.mark.parametrize(("model", "launches"), [("gpt2", 24), ("llama", 24)])
def test_an_update(model: str, launches: int) -> None:
    """What a step has besides its micro-batches: the norm of the gradients, the update, the parameters it makes."""
    for layers in (2, 3):
        run = Run(model, layers)
        update = step(run) - micro_batch(run)
        assert update.launches == launches and update.kernels["adamw_"] == 2, update.kernels


@pytest.mark.parametrize("model", MODELS)
def test_the_host_waits_once_a_step(model: str) -> None:
    assert step(Run(model)).waits == 1 and micro_batch(Run(model)).waits == 0
