"""Several ranks that share one GPU against one process on the CPU, in float64: rows of the parity matrix.

The ranks' group voids what a collective writes until it is waited for, so the same tests mean something on a CPU.
"""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from parity_rows import Row, config_of
from parity_run import assert_parity, reference, train_on_this_rank
from staged_group import on_staged_group

from megatron_ds.testing import run_ranks

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
TP, PP, DP = (2, 1, 1), (1, 2, 1), (1, 1, 2)
ROWS = [
    Row(TP, sequence_parallel=True, recompute="full", accumulation=4, dropout=True, smoothing=True),
    Row(TP, architecture="llama", tied=False, documents=True, qk_norm=True, recompute="selective", bucket_mb=0.008),
    Row(PP, accumulation=4, recompute="every_n", dropout=True),
    Row(PP, accumulation=4, schedule="gpipe", split="uneven", architecture="bloom", tied=False),
    Row(DP, zero=3, offload="cpu", accumulation=4, bucket_mb=0.008, recompute="full", dropout=True),
    Row(DP, zero=3, offload="nvme", architecture="llama", tied=False, micro_batch=2, keep_whole=True),
    Row(DP, zero=2, accumulation=4, optimizer="sgd", overlap=False),
    Row(DP, zero=1, offload="cpu", architecture="bert", bucket_mb=0.008),
    Row((2, 1, 2), zero=3, offload="cpu", sequence_parallel=True, accumulation=4, documents=True, bucket_mb=0.008),
    Row((2, 1, 2), zero=2, architecture="llama", tied=False, sequence_parallel=True, dropout=True, smoothing=True),
    Row((1, 2, 2), zero=2, accumulation=4, bucket_mb=0.008, recompute="full"),
    Row((1, 2, 2), zero=3, offload="cpu", accumulation=4, hybrid=True, architecture="llama"),
]
JOBS = [list(rows) for _, rows in groupby(ROWS, lambda row: row.mesh)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", JOBS, ids=lambda rows: "tp{}-pp{}-dp{}".format(*rows[0].mesh))
def test_same_numbers_as_one_process(rows: list[Row], device: str) -> None:
    ranks = run_ranks(on_staged_group, rows[0].world_size, device, train_on_this_rank, rows)
    for index, row in enumerate(rows):
        assert_parity([outcomes[index] for outcomes in ranks], reference(config_of(row)))
