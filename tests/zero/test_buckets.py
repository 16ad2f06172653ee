"""The layout of flat buckets: every element of every parameter at one place, on one rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron_ds.config import ZeroConfig
from megatron_ds.optim.rule import RuleGroup
from megatron_ds.shard import ShardedDim, ShardSpec, empty_parameter
from megatron_ds.zero.buckets import ALIGN, ParameterInfo, owned_ranges, plan_buckets
from megatron_ds.zero.layout import ZeroLayout

ADAMW = RuleGroup(kinds=("exp_avg", "exp_avg_sq"))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

parameter_infos = st.lists(
    st.builds(
        lambda numel, dtype, partial, trainable, shared, whole, replica: ParameterInfo(
            ShardSpec("p", (numel,), reduce_over=("tp",) if partial else (), replica=replica),
            dtype,
            trainable,
            0 if shared else None,
            rule=RuleGroup(whole=whole),
        ),
        numel=st.sampled_from([0, 1, 3, 31, 32, 33, 100, 1000]),
        dtype=st.sampled_from(DTYPES),
        partial=st.booleans(),
        trainable=st.booleans(),
        shared=st.booleans(),
        whole=st.booleans(),
        replica=st.booleans(),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(infos=parameter_infos, shards=st.integers(1, 9), bucket_bytes=st.sampled_from([1.0, 400.0, 5000.0, 1e9]))
def test_every_element_has_one_place(infos: list[ParameterInfo], shards: int, bucket_bytes: float) -> None:
    layouts = plan_buckets(infos, bucket_bytes, shards)
    placed = sorted(slot.parameter for layout in layouts for slot in layout.slots)
    assert placed == [index for index, info in enumerate(infos) if info.trainable]
    for layout in layouts:
        assert layout.size % (ALIGN * shards) == 0
        owners = torch.zeros(layout.size)
        for slot in layout.slots:
            info = infos[slot.parameter]
            assert (info.dtype, info.spec.reduce_over, info.shared) == (
                layout.key.dtype,
                layout.key.reduce_over,
                layout.key.shared,
            )
            assert slot.start % ALIGN == 0 and slot.numel == info.numel
            owners[slot.start : slot.start + slot.numel] += 1
        assert owners.max() <= 1 if layout.size else True  # no overlap
        itemsize = 8 if layout.key.dtype == torch.float64 else 4
        largest = max(-(-slot.numel // ALIGN) * ALIGN for slot in layout.slots)
        used = sum(-(-slot.numel // ALIGN) * ALIGN for slot in layout.slots)
        if layout.key.rule.whole:
            assert len(layout.slots) == 1 or used <= max(bucket_bytes / itemsize + ALIGN, shards * largest)
            # Every parameter is one rank's, and no slice has more than the mean and the largest parameter.
            pieces = [segment.slot.parameter for rank in range(shards) for segment in layout.segments(rank)]
            assert sorted(pieces) == sorted(slot.parameter for slot in layout.slots if slot.numel)
            assert layout.shard_size <= used / shards + largest
        else:
            end = layout.slots[-1].start + layout.slots[-1].numel
            assert len(layout.slots) == 1 or end * itemsize <= bucket_bytes
        padded = torch.full((layout.size,), torch.nan)
        layout.clear_padding(padded)
        assert torch.equal(padded.isnan(), owners == 1) and not padded[owners == 0].any()
        seen, counted, replicas = (torch.zeros(layout.size) for _ in range(3))
        for rank in range(shards):
            for begin, end in owned_ranges(layout.segments(rank)):
                counted[rank * layout.shard_size :][begin:end] += 1
            for segment in layout.segments(rank):
                assert segment.offset >= 0 and segment.offset + segment.numel <= layout.shard_size
                place = rank * layout.shard_size + segment.offset
                assert place == segment.slot.start + segment.start
                seen[place : place + segment.numel] += 1
                replicas[place : place + segment.numel] += segment.spec.replica
        # What counts in the norm: each element once, but for replicas; padding is zero.
        assert torch.equal(counted[owners == 1], 1 - replicas[owners == 1]) and not (counted > 1).any()
        assert torch.equal(seen, owners)  # the segments of all ranks are the parameters, each element once


def test_buckets_come_in_the_order_the_backward_pass_fills_them() -> None:
    infos = [
        ParameterInfo(ShardSpec(f"{i}", (100,), reduce_over=("tp",) if i % 4 == 0 else ()), torch.float32)
        for i in range(10)
    ]
    layouts = plan_buckets(infos, 1000, shards=2)
    places = [[slot.parameter for slot in layout.slots] for layout in layouts]
    # Sums over TP have buckets of their own (8, 4, 0 fill two); a bucket's turn comes with its last gradient.
    assert places == [[9, 7], [6, 5], [8, 4], [3, 2], [1], [0]]


def test_bytes_of_a_175b_model_on_one_of_1024_ranks() -> None:
    """The ZeRO paper's formula (Rajbhandari et al. 2020, section 5), with fp32 gradients: 2 + 4 + 12 / N bytes."""
    infos = [
        ParameterInfo(ShardSpec(f"{layer}.{name}", shape, (ShardedDim(0, "tp", 0, 8),)), torch.bfloat16, rule=ADAMW)
        for layer in range(12)
        for name, shape in (("qkv", (36864, 12288)), ("out", (12288, 12288)), ("up", (49152, 12288)))
    ]
    numel = sum(info.numel for info in infos)
    report = ZeroLayout.plan(infos, ZeroConfig(bucket_mb=25), {(): (64, 1)}).bytes().by_kind
    assert report["parameters"] == pytest.approx(2 * numel, rel=1e-4)
    assert report["gradients"] == pytest.approx(4 * numel, rel=1e-4)
    assert report["master"] == pytest.approx(4 * numel / 64, rel=1e-4)
    assert report["optimizer"] == pytest.approx(8 * numel / 64, rel=1e-4)


def test_parameters_on_the_meta_device_have_a_layout_too() -> None:
    parameter = empty_parameter(
        ShardSpec("w", (64, 64), (ShardedDim(0, "tp", 1, 2),)), device="meta", dtype=torch.bfloat16
    )
    info = ParameterInfo.of(parameter)
    assert (info.numel, info.dtype, info.trainable) == (2048, torch.bfloat16, True)


def test_a_parameter_without_a_spec_or_of_another_shape_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"shape \[3, 4\] has no ShardSpec"):
        ParameterInfo.of(parameter)
    parameter.shard = ShardSpec("w", (6, 4))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"w has shape \[3, 4\], but its ShardSpec describes \[6, 4\]"):
        ParameterInfo.of(parameter)
