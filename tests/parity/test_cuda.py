"""One GPU against one process on the CPU, in float64: the matrix's own settings with the reference kernels."""

from __future__ import annotations

import sys

import pytest
import torch
from parity_rows import Row, config_of
from parity_run import assert_parity, reference, train
from torch import Tensor

from megatron_ds.config import validate
from megatron_ds.layers import position
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
def test_one_gpu_computes_what_a_cpu_does(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout included: which elements are dropped follows from names and indices."""

    def table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        both = rotary_table(positions.cpu(), frequencies.cpu(), dtype)
        return tuple(part.to(positions.device) for part in both)

    # Rotary angles are fp32 by definition, and the devices' sines of them differ in the last bit, by 6e-8.
    rotary_table = position.rotary_table
    for module in (position, *(m for m in sys.modules.values() if getattr(m, "rotary_table", None) is rotary_table)):
        monkeypatch.setattr(module, "rotary_table", table)
    config = config_of(row)
    assert_parity([train(config, on(row, "cuda"))], reference(config))
