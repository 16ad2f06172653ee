"""ZeRO 0 to 3 against one process of plain torch: norms, parameters, and overlap on against off."""

from __future__ import annotations

from dataclasses import astuple
from itertools import combinations, product
from typing import Any

import pytest
import torch
from zero_toy import STEPS, Case, reference, train_cases

from megatron_ds.testing import run_ranks

CASES = [
    Case(stage, accumulate, optimizer, clip, bucket_mb=bucket_mb, shared_memory=shared, keep_whole=stage > 1 and keep)
    for (stage, shared, accumulate, optimizer, clip), bucket_mb, keep in zip(
        product((0, 1, 2, 3), (True, False), (1, 3), ("adamw", "sgd"), (0.0, 2.0)),
        (0.0006, 1.0, 0.0001) * 22,
        (False, False, True, False, True) * 13,
    )
    if stage >= 1 or not shared
]
CASES += [
    Case(stage, accumulate, optimizer, clip, shared_memory=shared, offload=offload, ratio=ratio)
    for (stage, offload, accumulate), optimizer, clip, shared, ratio in zip(
        product((1, 2, 3), ("cpu", "nvme"), (1, 3)),
        ("adamw", "sgd", "adamw") * 4,
        (2.0, 0.0) * 6,
        (True, True, False, False) * 3,
        (1.0, 0.5, 1.0) * 4,
    )
]
# Rules of two kinds, at every stage and on every store.
CASES += [
    Case(stage, 1, rules, clip, bucket_mb=bucket_mb, shared_memory=shared, offload=offload)
    for rules in ("mixed", "whole")
    for (stage, offload), clip, bucket_mb, shared in zip(
        [(0, "none"), *product((1, 2, 3), ("none", "cpu", "nvme"))],
        (2.0, 0.0) * 5,
        (0.0006, 1.0, 0.0001) * 4,
        (False, *(True, False, False, True) * 3),
    )
]


def with_every_pair(cases: list[Case]) -> list[Case]:
    """Of the cases a few in which every pair of settings occurs that occurs in any: each has the most new pairs."""
    pairs = {case: set(combinations(enumerate(astuple(case)), 2)) for case in cases}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(missing & pairs[case])))
        missing -= pairs[chosen[-1]]
    return chosen


def check(cases: list[Case], results: list[Any]) -> None:
    for rank, of_rank in enumerate(results):
        for case, ((norms, parameters), (serial_norms, serial_parameters)) in zip(cases, of_rank, strict=True):
            want_norms, want = reference(case)
            for name, tensor in want.items():
                error = (parameters[name] - tensor).abs().max().item() if tensor.numel() else 0.0
                assert error < 1e-12, f"rank {rank}, {case}: {name} is off by {error}"
                assert torch.equal(parameters[name], serial_parameters[name]), f"{case}: overlap changed {name}"
            assert len(norms) == STEPS
            assert norms == pytest.approx(want_norms, rel=1e-12), f"rank {rank}, {case}"
            assert norms == serial_norms


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_equals_plain_torch(world_size: int) -> None:
    """Every case on three ranks, whose shards are uneven; on two and four every pair of settings."""
    cases = CASES if world_size == 3 else with_every_pair(CASES)
    check(cases, run_ranks(train_cases, world_size, cases))


def test_equals_plain_torch_on_one_process() -> None:
    check(CASES, [train_cases(CASES)])
