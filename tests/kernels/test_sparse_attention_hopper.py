"""The Triton twin compiled for sm_90 as a launch would compile it: tensor cores, registers, little shared memory."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from hopper import SHARED_LIMIT, captured

from megatron_ds.kernels import block_layout
from megatron_ds.kernels import block_patterns as patterns
from megatron_ds.kernels.sparse_attention import _flat
from megatron_ds.kernels.triton import sparse_attention as twin

HEADS, GROUPS, BATCH = 16, 4, 64  # places of queries, keys and values need 64 bits
# block, head dim, tokens, dtype, whether the kernels take the window as one or by its lists
SHAPES = [
    (64, 64, 65536, torch.bfloat16, True),
    (64, 128, 65536, torch.bfloat16, True),
    (64, 128, 65536, torch.bfloat16, False),
    (128, 128, 4000, torch.float16, False),  # cut short: every access has a mask
    (64, 128, 65536, torch.float32, False),  # three tf32 products a product, on tiles too small for HGMMA
]


@pytest.mark.parametrize(("block", "head_dim", "length", "dtype", "window"), SHAPES)
def test_tensor_cores_and_registers(block: int, head_dim: int, length: int, dtype: torch.dtype, window: bool) -> None:
    layout = patterns.sliding_window(length, block, HEADS).to("meta")
    assert layout.is_window
    # The memory order of a model: the sequence first, keys and values beside the queries of their group.
    qkv = torch.empty(length, BATCH, GROUPS, HEADS // GROUPS + 2, head_dim, dtype=dtype, device="meta")
    q = torch.empty(length, BATCH, HEADS, head_dim, dtype=dtype, device="meta").permute(1, 2, 0, 3)
    k, v = (qkv[..., i, :].permute(1, 2, 0, 3) for i in (-2, -1))
    lse = torch.empty(BATCH, HEADS, length, device="meta")
    with captured() as kernels:
        twin.forward(q, k, v, _flat(layout), block, window, 0.1, torch.empty_like(q), lse)
        results = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        twin.backward(q, q, k, v, q, lse, _flat(layout), block, window, 0.1, *results)
    assert [kernel.name for kernel in kernels] == ["forward_kernel", "query_kernel", "key_kernel"]
    for kernel in kernels:
        single = dtype == torch.float32
        assert not kernel.overflows, f"{kernel.name}: {kernel.overflows}"
        cores = "HMMA" if single else "HGMMA"
        assert kernel.count(cores), f"{kernel.name} does not use the tensor cores"
        # Measured: the tiles of the key kernel that spill a little at wide heads are faster than those that do not.
        most = 64 if kernel.name == "key_kernel" and head_dim > 64 and not single else 0
        assert kernel.stack <= most, f"{kernel.name}: {kernel.stack} bytes of stack, {kernel.registers} registers"
        assert most or not kernel.spills, f"{kernel.name}: {kernel.spills} spills"
        assert kernel.shared <= SHARED_LIMIT, f"{kernel.name}: {kernel.shared} bytes of shared memory"
        wide = r"LDG\S*\.128" if single else r"LDGSTS\S*\.128"
        assert kernel.count(wide), f"{kernel.name} does not load 16 bytes at a time, in half precision to shared memory"
        if window and kernel.name != "key_kernel":
            # Nothing is loaded but tiles, where the window begins, and a row's statistics; two programs fit on an SM.
            narrow = kernel.count(r"LDG(STS)?\.E") - kernel.count(r"LDG(STS)?\.E\S*\.128")
            assert narrow <= 5 and 2 * kernel.shared <= SHARED_LIMIT, f"{kernel.name}: {narrow} narrow loads"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_specialised_warps(head_dim: int) -> None:
    """Four warps that load and eight that compute, each group with registers of its own: nothing spills."""
    with patch.object(block_layout, "_WINDOW", 1 << 30):
        layout = patterns.dense(8192, 128, HEADS).to("meta")
    q, k = (torch.empty(1024, n, 8192, head_dim, dtype=torch.bfloat16, device="meta") for n in (HEADS, GROUPS))
    lse = torch.empty(1024, HEADS, 8192, device="meta")
    with captured() as kernels, patch.object(twin, "SPECIALIZED", True):
        twin.forward(q, k, k, _flat(layout), 128, layout.is_window, 0.1, torch.empty_like(q), lse)
    (kernel,) = kernels
    assert kernel.name == "specialized_forward_kernel" and not kernel.spills
    assert kernel.count("USETMAXREG") and kernel.count("UTMALDG") and kernel.count("HGMMA")
    assert kernel.registers == 168 and kernel.shared <= SHARED_LIMIT
    assert not kernel.overflows


def test_more_heads_than_a_grid_has_rows() -> None:
    """70,400 heads of samples, in every launch; ``captured`` knows what a driver refuses. A global column is split."""
    batch, length, block = 70400 // HEADS, 1024, 16
    layout = patterns.bigbird(length, block, HEADS)
    assert len(layout.long_columns)
    x = torch.empty(batch, HEADS, length, 64, dtype=torch.float16, device="meta")
    lse = torch.empty(batch, HEADS, length, device="meta")
    flat = _flat(layout.to("meta"))
    with captured() as kernels:
        twin.forward(x, x, x, flat, block, False, 0.1, torch.empty_like(x), lse)
        twin.backward(x, x, x, x, x, lse, flat, block, False, 0.1, *(torch.empty_like(x) for _ in range(3)))
    assert [k.name for k in kernels] == ["forward_kernel", "query_kernel", "key_kernel", "key_kernel"] + [
        "add_up_kernel"
    ] * 2
    assert not any(k.overflows for k in kernels), [k.overflows for k in kernels]
