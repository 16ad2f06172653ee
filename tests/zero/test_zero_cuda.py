"""ZeRO on tensors of a GPU: one rank alone, and several ranks that share it, against plain torch on the CPU.

The ranks' group voids what a collective writes until it is waited for, so the same tests mean something on a CPU.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from staged_group import on_staged_group
from zero_toy import STEPS, Case, reference, train_cases

from megatron_ds.testing import run_ranks

CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CASES = [
    Case(stage, accumulate, optimizer, clip, shared_memory=False, offload=offload, ratio=ratio, keep_whole=keep)
    for (stage, offload, accumulate), optimizer, clip, ratio, keep in zip(
        product((1, 2, 3), ("none", "cpu", "nvme"), (1, 3)),
        ("adamw", "sgd", "adamw") * 6,
        (2.0, 0.0) * 9,
        (1.0, 1.0, 0.5, 1.0, 0.5) * 4,
        (False,) * 12 + (True, False, False) * 2,
    )
]
CASES += [Case(0, shared_memory=False), Case(0, 3, "sgd", 2.0, shared_memory=False)]


@pytest.mark.parametrize(
    ("world_size", "device"), [(2, "cpu"), *(pytest.param(size, "cuda", marks=CUDA) for size in (1, 2, 4))]
)
def test_equals_plain_torch_on_a_cpu(world_size: int, device: str) -> None:
    cases = CASES if world_size < 4 else [case for case in CASES if case.stage == 3]
    for rank, of_rank in enumerate(run_ranks(on_staged_group, world_size, device, train_cases, cases)):
        for case, runs in zip(cases, of_rank, strict=True):
            want_norms, want = reference(case)
            for overlap, (norms, parameters) in zip((True, False), runs, strict=True):
                where = f"rank {rank} of {world_size}, overlap {overlap}, {case}"
                assert len(norms) == STEPS and norms == pytest.approx(want_norms, rel=1e-9), where
                for name, tensor in want.items():
                    error = (parameters[name] - tensor).abs().max().item() if tensor.numel() else 0.0
                    assert error < 1e-9, f"{where}: {name} is off by {error}"
