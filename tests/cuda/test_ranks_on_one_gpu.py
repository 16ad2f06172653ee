"""Two and four ranks on one GPU against one process on a CPU, in float64: what a GPU does between collectives.

NCCL takes one rank a GPU, so the ranks talk through ``staged_group``, on which a result that is read before it is
waited for is NaN. A few of the same runs are made on the CPU, so that the tests themselves stay tested without a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import parity_run
import pytest
import staged_group
import torch
import unit_models
from parity_rows import Mesh3, Row, config_of, reference_config
from torch import Tensor
from unit_models import Setting

from megatron_ds.config import RunConfig
from megatron_ds.testing import run_ranks

TOLERANCE = 1e-9
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
OFFLOADS = ("none", "cpu", "nvme")


def of_stage(stage: int) -> list[Setting]:
    return [Setting(stage, offload=offload, accumulate=a) for offload in OFFLOADS for a in (1, 2)]


STAGE_3 = [
    *of_stage(3),
    *(Setting(prefetch=0, offload=offload) for offload in OFFLOADS),
    Setting(prefetch=0, overlap=False),
    Setting(prefetch=3, threshold=40, offload="cpu"),
    Setting(keep_whole=True, accumulate=2),
]
ON_FOUR = [Setting(prefetch=prefetch, offload=offload) for prefetch in (0, 1) for offload in OFFLOADS]
ZERO = {
    "2-ranks-stage-1": (2, of_stage(1)),
    "2-ranks-stage-2": (2, of_stage(2)),
    "2-ranks-stage-3": (2, STAGE_3),
    "4-ranks-stage-3": (4, ON_FOUR),
}
ZERO_ON_CPU = [
    Setting(1, accumulate=2),
    Setting(2, accumulate=2, offload="cpu"),
    Setting(3),
    Setting(3, prefetch=0, offload="nvme"),
]

TP: Mesh3 = (2, 1, 1)
PP: Mesh3 = (1, 2, 1)
TP_DP: Mesh3 = (2, 1, 2)
PP_DP: Mesh3 = (1, 2, 2)
TP_PP: Mesh3 = (2, 2, 1)
ROWS = [
    Row(TP, accumulation=4),
    Row(TP, architecture="llama", sequence_parallel=True, tied=False, documents=True, qk_norm=True),
    Row(TP, architecture="bloom", sequence_parallel=True, recompute="full", smoothing=True, dropout=True),
    Row(TP, architecture="bert", recompute="selective", micro_batch=2, dropout=True),
    Row(PP, accumulation=4, dropout=True),
    Row(PP, architecture="llama", accumulation=4, split="uneven", recompute="full", tied=False),
    Row(PP, accumulation=4, schedule="gpipe", optimizer="sgd"),
    Row(TP_DP, sequence_parallel=True, zero=3, offload="nvme", accumulation=4, bucket_mb=0.008),
    Row(TP_DP, architecture="llama", zero=2, offload="cpu", overlap=False, recompute="full"),
    Row(PP_DP, zero=1, accumulation=4, bucket_mb=0.008, dropout=True),
    Row(PP_DP, zero=3, offload="cpu", accumulation=4, recompute="selective", bucket_mb=0.008),
    Row(TP_PP, sequence_parallel=True, accumulation=4, dropout=True),
]
ROWS_ON_CPU = [
    Row(TP, architecture="llama", sequence_parallel=True, tied=False, documents=True),
    Row(PP, accumulation=4),
]


def train_zero(settings: list[Setting], device: str) -> Any:
    """Here, so that a rank imports this module, and with it the group."""
    return unit_models.train(settings, device)


def train_rows(rows: list[Row], device: str) -> Any:
    with parity_run.rotary_tables_of_the_cpu():
        return parity_run.train_on_this_rank(rows, device)


def run(function: Any, world_size: int, cases: list[Any], device: str) -> list[Any]:
    return run_ranks(function, world_size, cases, device, backend=staged_group.BACKEND, device=device)


@cache
def plain() -> dict[str, Tensor]:
    return unit_models.plain()


@cache
def one_process(config: str) -> parity_run.Outcome:
    return parity_run.reference(RunConfig.model_validate_json(config))


def check_zero(world_size: int, settings: list[Setting], device: str) -> None:
    for rank, results in enumerate(run(train_zero, world_size, settings, device)):
        for setting, (parameters, _) in zip(settings, results, strict=True):
            for name, tensor in plain().items():
                error = (parameters[name] - tensor).abs().max().item() if tensor.numel() else 0.0
                assert error < TOLERANCE, f"rank {rank}, {setting}: {name} is off by {error}"


def check_rows(rows: list[Row], device: str) -> None:
    """Rows of one mesh."""
    ranks = run(train_rows, rows[0].world_size, rows, device)
    for number, row in enumerate(rows):
        want = one_process(reference_config(config_of(row)).model_dump_json())
        try:
            parity_run.assert_parity([outcomes[number] for outcomes in ranks], want)
        except parity_run.ParityError as error:
            raise AssertionError(f"{row} on {device}:\n{error}") from error


@pytest.mark.cuda
@on_a_gpu
@pytest.mark.parametrize("job", ZERO)
def test_zero_on_one_gpu_equals_plain_torch(job: str) -> None:
    check_zero(*ZERO[job], "cuda:0")


@pytest.mark.cuda
@on_a_gpu
@pytest.mark.parametrize("mesh", [TP, PP, TP_DP, PP_DP, TP_PP], ids="tp{0[0]}-pp{0[1]}-dp{0[2]}".format)
def test_a_mesh_on_one_gpu_computes_what_a_cpu_does(mesh: Mesh3) -> None:
    """Dropout included: which elements are dropped follows from names and indices."""
    check_rows([row for row in ROWS if row.mesh == mesh], "cuda:0")


def test_zero_through_the_staged_group() -> None:
    check_zero(2, ZERO_ON_CPU, "cpu")


@pytest.mark.parametrize("row", ROWS_ON_CPU, ids=str)
def test_a_mesh_through_the_staged_group(row: Row) -> None:
    check_rows([row], "cpu")
