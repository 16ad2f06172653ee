"""DeepSpeed's scripts with one changed import give the numbers of plain torch, at every stage, on one and two ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import deepspeed_scripts as scripts
import pytest
import torch
from deepspeed_scripts import CLIP, DECAY, LR, MICRO, WARMUP, Ran
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torch.utils.data import DistributedSampler

from megatron_ds.integrations import deepspeed
from megatron_ds.testing import run_ranks


def by_engine(names: list[str], stages: tuple[int, ...], dtype: torch.dtype) -> dict[tuple[str, int], Ran]:
    return {(name, stage): getattr(scripts, name)(deepspeed, stage, dtype) for name in names for stage in stages}


# --- the same in plain torch, one process, the ranks' losses averaged


def of_ranks(ranks: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Of each micro-batch of two epochs what the ranks get."""
    samples, labels = scripts.data()
    orders = [list(DistributedSampler(range(len(samples)), ranks, rank)) for rank in range(ranks)]  # type: ignore[arg-type]
    for _ in range(2):
        for start in range(0, len(orders[0]), MICRO):
            chosen = [order[start : start + MICRO] for order in orders]
            yield [(samples[c], labels[c]) for c in chosen]


def states(**models: nn.Module) -> dict[str, Any]:
    return {f"{of}{name}": value.tolist() for of, m in models.items() for name, value in m.state_dict().items()}


def classifier(ranks: int, dtype: torch.dtype) -> list[Ran]:
    model = scripts.net(1, scripts.CLASSES).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    losses: list[list[float]] = [[] for _ in range(ranks)]
    rates = []
    for number, batches in enumerate(of_ranks(ranks)):
        rate = LR * min(1.0, max(0, number // 2 - 1) / WARMUP)  # the first two updates run at 0
        rates.append(rate)
        total = torch.zeros((), dtype=dtype)
        for rank, (batch, target) in enumerate(batches):
            loss = cross_entropy(model(batch.to(dtype)), target)
            losses[rank].append(loss.item())
            total = total + loss
        (total / ranks / 2).backward()
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    return [Ran(own, rates, model.state_dict()) for own in losses]


def gan_frozen(ranks: int, dtype: torch.dtype) -> list[Ran]:
    return gan(ranks, dtype)


def gan(ranks: int, dtype: torch.dtype) -> list[Ran]:
    g, d = scripts.net(2, scripts.WIDTH).to(dtype), scripts.net(3, 1).to(dtype)
    of_g, of_d = (torch.optim.Adam(m.parameters(), lr=LR, betas=(0.5, 0.9)) for m in (g, d))
    losses: list[list[float]] = [[] for _ in range(ranks)]
    for step in range(4):
        parts = [scripts.gan_batch(step, ranks, rank, dtype) for rank in range(ranks)]
        of_d.zero_grad()
        for rank, (real, noise) in enumerate(parts):
            loss = softplus(-d(real)).mean() + softplus(d(g(noise).detach())).mean()
            (loss / ranks).backward()
            losses[rank].append(loss.item())
        of_d.step()
        of_g.zero_grad()
        for rank, (_, noise) in enumerate(parts):
            loss = softplus(-d(g(noise))).mean()
            (loss / ranks).backward()
            losses[rank][-1] += loss.item()
        of_g.step()
    found = {f"g.{k}": v for k, v in g.state_dict().items()} | {f"d.{k}": v for k, v in d.state_dict().items()}
    return [Ran(own, [], found) for own in losses]


def pipeline(ranks: int, dtype: torch.dtype) -> list[Ran]:
    made = []
    for index, layer in enumerate(scripts.layers(deepspeed)):
        torch.manual_seed(1234 + index)  # as seed_layers does
        made.append(layer.build() if hasattr(layer, "build") else layer)
    model = nn.ModuleDict({str(i): layer for i, layer in enumerate(made) if isinstance(layer, nn.Module)}).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    samples, labels = (part.chunk(ranks) for part in scripts.data())
    losses = []
    for step in range(3 if ranks > 1 else 6):
        total = torch.zeros((), dtype=dtype)
        for rank in range(ranks):
            for micro in (2 * step, 2 * step + 1):
                hidden = samples[rank].to(dtype).split(MICRO)[micro]
                for layer in made:
                    hidden = layer(hidden)
                total = total + cross_entropy(hidden, labels[rank].split(MICRO)[micro]) / (2 * ranks)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return [Ran(losses, [], model.state_dict())] * ranks


@functools.cache
def plain(name: str, ranks: int, dtype: torch.dtype) -> list[Ran]:
    return globals()[name](ranks, dtype)  # type: ignore[no-any-return]


def check(got: Ran, want: Ran, bound: float, at: Any) -> None:
    assert got.losses == pytest.approx(want.losses, rel=bound, abs=bound), at
    assert got.rates == pytest.approx(want.rates, rel=bound), at
    assert got.weights.keys() == want.weights.keys(), at
    for name, value in want.weights.items():
        found = torch.tensor(got.weights[name], dtype=torch.float64)
        assert (found - torch.as_tensor(value).double()).abs().max() < bound, (at, name)


@pytest.mark.parametrize(("ranks", "apart", "stages"), [(1, False, (0, 3)), (2, False, (0, 1, 2, 3)), (2, True, (3,))])
def test_a_script_with_one_changed_import_gives_the_numbers_of_plain_torch(
    ranks: int, apart: bool, stages: tuple[int, ...]
) -> None:
    names = ["classifier", "gan", "gan_frozen", "pipeline"]
    for rank, found in enumerate(run_ranks(by_engine, ranks, names, stages, torch.float64, apart=apart)):
        assert len(found) == len(names) * len(stages)
        for (name, stage), got in found.items():
            check(got, plain(name, ranks, torch.float64)[rank], 1e-9, (name, stage, rank))
