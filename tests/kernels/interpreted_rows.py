"""Cases of the kernel that adds rows to a table: repeated ones, of any layout, in fp32 without a copy of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from interpreted_inputs import LAYOUTS, normal
from interpreter_worker import Canaries, close
from torch import Tensor

from megatron_ds.kernels import registry
from megatron_ds.kernels.accumulate import add_rows

ROWS: dict[str, Callable[[], None]] = {}


def rows_case(indices: Tensor, columns: int, dtype: torch.dtype, lay: Callable[..., Tensor] = normal) -> None:
    canaries = Canaries()
    total = canaries.around(normal(7, columns))
    rows = canaries.around(lay(len(indices), 1, columns, dtype=dtype))[:, 0]
    want = total.double().index_add(0, indices, rows.double())
    with registry.use("triton"), canaries.around_allocations():
        add_rows(total, indices, rows)
    canaries.check()
    close("table", total, want, 3e-6)


# The first and the last row of the table; one for all, more than a program takes at a time; each once; none.
MANY = torch.tensor([6, 0, 3, 3, 0, 6, 6, 1, 0])
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    ROWS[f"add_rows {dtype}"] = partial(rows_case, MANY, 5, dtype)
for name, lay in LAYOUTS.items():
    if name:
        ROWS[f"add_rows{name}"] = partial(rows_case, MANY, 6, torch.bfloat16, lay)
ROWS["add_rows of one row"] = partial(rows_case, torch.full((35,), 2), 3, torch.bfloat16)


def parts_case(counts: list[int]) -> None:
    """Equal indices that begin, end or lie whole in parts of 16, at the edges of parts and between them."""
    from megatron_ds.kernels.triton import add_rows as twin

    with patch.object(twin, "PART", 16):
        rows_case(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), 130, torch.bfloat16)


for counts in ([16, 16, 1], [17, 15, 33], [3, 50, 20, 0, 2], [5, 290, 0, 0, 0, 0, 1], [32, 31, 1, 16]):
    ROWS[f"add_rows in parts {counts}"] = partial(parts_case, counts)
ROWS["add_rows once each"] = partial(rows_case, torch.tensor([4, 2, 0]), 130, torch.float16)
ROWS["add_rows of nothing"] = partial(rows_case, torch.zeros(0, dtype=torch.int64), 4, torch.bfloat16)
