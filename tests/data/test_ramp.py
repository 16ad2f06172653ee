"""Batch ramp-up against counting it out step by step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_ds.data.loader import BatchRamp


@given(start=st.integers(1, 20), increment=st.integers(1, 9), parts=st.integers(0, 9), samples=st.integers(1, 500))
def test_sizes_grow_in_equal_parts_of_the_samples(start: int, increment: int, parts: int, samples: int) -> None:
    ramp = BatchRamp(start, increment, samples, start + parts * increment)
    assert ramp.sizes() == [start + i * increment for i in range(parts + 1)]
    for consumed in range(samples + 50):
        # The parts that are over: each ends after an equal share of the samples.
        over = sum(consumed * parts >= (i + 1) * samples for i in range(parts))
        assert ramp(consumed) == start + over * increment
    assert ramp(samples) == ramp(10**15) == ramp.sizes()[-1]


def test_one_size_without_a_ramp() -> None:
    ramp = BatchRamp(8, 1, 1, 8)
    assert ramp.sizes() == [8] and {ramp(consumed) for consumed in range(100)} == {8}
