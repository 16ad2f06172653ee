"""The layout of a rank as pure data: the bytes it holds and sends are those of the ZeRO paper's closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ds.config import ZeroConfig
from megatron_ds.optim.rule import RuleGroup
from megatron_ds.shard import ShardSpec
from megatron_ds.zero.buckets import ParameterInfo
from megatron_ds.zero.layout import ZeroLayout

GB = 10**9
ADAMW = RuleGroup(kinds=("exp_avg", "exp_avg_sq"))


def layout_of(
    stage: int,
    shard: int,
    elements: int,
    dtype: torch.dtype = torch.bfloat16,
    tensors: int = 1,
    copies: int = 1,
    **settings: Any,
) -> ZeroLayout:
    """Of ``elements`` parameters in ``tensors`` equal ones, each a bucket and at stage 3 a unit, updated by AdamW."""
    size = elements // tensors
    infos = [
        ParameterInfo(ShardSpec(f"w{i}", (size,)), dtype, unit=i if stage == 3 else None, rule=ADAMW)
        for i in range(tensors)
    ]
    config = ZeroConfig(stage=stage, bucket_mb=size * 4 / 1e6, **settings)
    return ZeroLayout.plan(infos, config, {(): (shard, copies)})


def test_the_papers_figure_1() -> None:
    """7.5 billion parameters, 64 ranks, Adam in mixed precision: 120, 31.4, 16.6 and 1.9 GB."""
    for stage, gigabytes in enumerate((120.0, 31.4, 16.6, 1.9)):
        layout = layout_of(stage, 64 if stage else 1, 7_500_000_000)
        parts = layout.bytes().by_kind
        # The paper's gradients are fp16; ours are summed in fp32.
        assert round((sum(parts.values()) - parts["gradients"] / 2) / GB, 1) == gigabytes
        assert layout.bytes().total("device") == sum(parts.values())


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, 4), (torch.float32, 4), (torch.float64, 8)])
def test_only_half_precision_has_master_weights(dtype: torch.dtype, wide: int) -> None:
    assert layout_of(1, 8, 1 << 20, dtype).bytes().by_kind == {
        "parameters": dtype.itemsize << 20,
        "gradients": wide << 20,
        "master": (wide << 20) // 8 if dtype.itemsize < wide else 0,
        "optimizer": (2 * wide << 20) // 8,
    }


def ring(size: int, ranks: int) -> int:
    """Bytes that one rank sends in a ring's reduce-scatter or all-gather: a piece a step, one step fewer than ranks."""
    return sum(size // ranks for _ in range(ranks - 1))


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_papers_section_7(ranks: int) -> None:
    """Parameters and gradients of one width: stages 1 and 2 move what an all-reduce does, stage 3 half as much more."""
    size = 4 << 20
    one = ring(size, ranks)

    def sent(stage: int, micro_batches: int = 1, **settings: Any) -> int:
        layout = layout_of(max(stage, 1), ranks, 1 << 20, torch.float32, **settings)
        return (layout if stage else layout.at_stage(0)).communication_bytes(micro_batches)

    assert [sent(stage) for stage in (0, 1, 2, 3)] == [2 * one, 2 * one, 2 * one, 3 * one]
    assert [sent(stage, 4) for stage in (0, 1, 2, 3)] == [2 * one, 2 * one, (4 + 1) * one, (4 + 8) * one]
    assert [sent(stage, 4, keep_whole=True) for stage in (2, 3)] == [2 * one, 2 * one]
    int8, int4 = (round(one * part) for part in (260 / 1024, 132 / 1024))  # of fp32: values, and a scale for 256
    assert sent(2, quantized_gradients="int8") == int8 + one and sent(1, quantized_gradients="int4") == int4 + one
    assert sent(3, 4, quantized_weights="int8") == 4 * one + 8 * int8
    if ranks == 8:  # in nodes of 2: half goes inside, of what is left three quarters between; gathered once over all
        inside, between = size // 2, size // 2 * 3 // 4
        assert sent(3, 2, secondary_size=2, quantized_weights="int8", quantized_gradients="int8") == (
            int8 + 3 * inside + 2 * (inside + between) * 260 // 1024
        )
    # Slices are summed over replicas, as an all-reduce does, once a step.
    assert sent(2, 4, copies=2) == (4 + 1) * one + 2 * ring(size // ranks, 2)


def test_a_lower_stage_is_that_of_a_layout_of_its_own() -> None:
    layout = layout_of(3, 8, 1 << 20, keep_whole=True, offload_parameters={"device": "cpu"})
    for stage in (1, 2):
        own = layout_of(stage, 8, 1 << 20)
        assert layout.at_stage(stage).bytes() == own.bytes() and layout.at_stage(stage).buckets == own.buckets
        assert layout.at_stage(stage).communication_bytes(3) == own.communication_bytes(3)
    assert layout.at_stage(0).bytes() == layout_of(0, 1, 1 << 20).bytes()


def test_what_is_offloaded_or_kept_whole_changes_the_device() -> None:
    """1 M parameters in bf16: 2 MB, gradients 4 MB, state 12 MB."""
    cpu = {"device": "cpu"}
    sizes = {"elements": 1 << 20, "tensors": 8}

    def on_device(stage: int, micro_batches: int = 1, **settings: Any) -> float:
        return layout_of(stage, 4, **sizes, **settings).bytes(micro_batches).total("device") / (1 << 20)

    assert on_device(1, offload_optimizer={**cpu, "ratio": 0.5}) == 2 + 4 + 3 / 2
    assert on_device(2, 2, keep_whole=True) == 2 + 4 + 3
    assert on_device(2, 1, keep_whole=True) == on_device(2) == 2 + 1 + 3
    assert on_device(3, offload_optimizer=cpu, offload_parameters=cpu) == 1
    held = layout_of(3, 4, **sizes, offload_optimizer=cpu, offload_parameters=cpu).bytes()
    gathered = [
        layout_of(3, 4, **sizes, quantized_weights=form).transient_bytes()["parameters"] for form in ("none", "int8")
    ]
    assert gathered == [2 * (2 << 20) // 8, 2 * (2 << 20) // 8 * 5 // 4], "two units, and then their slices again"
    assert held.total("host") == (2 + 12) * (1 << 20) // 4 and held.total("disk") == 0


def test_staging_holds_the_largest_region_and_keeps_within_the_bound() -> None:
    """Three regions of state are under way; a bound leaves what host-resident parameters do not take."""
    disk, region = {"device": "nvme", "path": "/swap"}, 12 * (1 << 20) // 8 // 4
    free = layout_of(3, 4, 1 << 20, tensors=8, offload_optimizer=disk).bytes()
    assert 3 * region <= free.staging <= 3 * region * 1.1 and free.total("disk") == 8 * region
    bounded = layout_of(
        3, 4, 1 << 20, tensors=8, offload_optimizer=disk, offload_parameters={"device": "cpu"}, host_memory_mb=1.5
    ).bytes()
    assert bounded.total("host") + bounded.staging == 1_500_000
