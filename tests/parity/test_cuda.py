"""One GPU against one process on the CPU, in float64: the matrix's own settings with the reference kernels."""

from __future__ import annotations

import pytest
import torch
from parity_rows import Row, config_of
from parity_run import assert_parity, reference, rotary_tables_of_the_cpu, train

from megatron_ds.config import validate
from megatron_ds.mesh import Mesh

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ALONE = (1, 1, 1)
ROWS = [
    Row(ALONE, architecture="gpt2", recompute="full", accumulation=4, dropout=True),
    Row(ALONE, architecture="llama", recompute="selective", tied=False, documents=True, qk_norm=True, bucket_mb=0.008),
    Row(ALONE, architecture="bloom", recompute="every_n", smoothing=True, optimizer="sgd", overlap=False),
    Row(ALONE, architecture="bert", micro_batch=2, accumulation=4, dropout=True),
    Row(ALONE, zero=1, accumulation=4, bucket_mb=0.008, dropout=True),
]


def on(row: Row, device: str) -> Mesh:
    return Mesh.create(validate(config_of(row), 1), torch.device(device))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_one_gpu_computes_what_a_cpu_does(row: Row) -> None:
    """Dropout included: which elements are dropped follows from names and indices."""
    config = config_of(row)
    with rotary_tables_of_the_cpu():
        assert_parity([train(config, on(row, "cuda"))], reference(config))
