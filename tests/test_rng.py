"""Initial weights and dropout do not depend on the mesh, and are random enough."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from megatron_ds.rng import DropoutKeys, derive_seed, dropout, initialize_parameters, keep_mask
from megatron_ds.shard import Init, ShardedDim, ShardSpec, empty_parameter


def initial(spec: ShardSpec, seed: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    parameter = empty_parameter(spec, dtype=dtype)
    parameter.data.fill_(torch.nan)
    initialize_parameters([parameter], seed)
    return parameter.detach()


SHARDED = [((3000, 4), 0), ((2400, 6), 1), ((12, 4, 8, 5), 0), ((2, 24, 5), 1), ((7, 24), 1), ((24,), 0)]


@pytest.mark.parametrize(
    "shape, dim, count", [(shape, dim, n) for shape, dim in SHARDED for n in (2, 3, 4, 6) if shape[dim] % n == 0]
)
def test_a_shard_is_a_slice_of_the_whole(shape: tuple[int, ...], dim: int, count: int) -> None:
    whole = initial(ShardSpec("w", shape))
    shards = [initial(ShardSpec("w", shape, (ShardedDim(dim, "tp", index, count),))) for index in range(count)]
    assert torch.equal(torch.cat(shards, dim), whole)


def test_a_shard_of_two_dims_is_a_box_of_the_whole() -> None:
    whole = initial(ShardSpec("w", (8, 6, 5)))
    for e in range(4):
        for t in range(2):
            spec = ShardSpec("w", (8, 6, 5), (ShardedDim(0, "ep", e, 4), ShardedDim(1, "tp", t, 2)))
            assert (spec.offset, spec.local_shape) == ((2 * e, 3 * t, 0), (2, 3, 5))
            assert torch.equal(initial(spec), whole[2 * e : 2 * e + 2, 3 * t : 3 * t + 3])
            assert torch.equal(spec.slice_of(whole), initial(spec))
    twice = ShardSpec("w", (8, 6, 5), (ShardedDim(0, "ep", 1, 2), ShardedDim(0, "tp", 1, 4)))  # the slices' slices
    assert (twice.offset, twice.local_shape) == ((5, 0, 0), (1, 6, 5))
    with pytest.raises(ValueError, match=r"w: dim 0 of \[8, 6, 5\] is not divisible by 3 shards over tp"):
        _ = ShardSpec("w", (8, 6, 5), (ShardedDim(0, "tp", 0, 3),)).local_shape


def test_a_block_of_huge_rows_is_cut_by_elements_alike_on_all_meshes() -> None:
    """Rows of more than 2^23 elements have a block each, whether or not a rank holds them whole."""
    shape = (3, 2, (1 << 22) + 1)
    whole = initial(ShardSpec("w", shape))
    part = initial(ShardSpec("w", shape, (ShardedDim(1, "tp", 1, 2),)))
    assert torch.equal(part, whole[:, 1:])
    assert torch.equal(initial(ShardSpec("w", shape, (ShardedDim(0, "tp", 2, 3),))), whole[2:])


def test_values_depend_on_seed_and_name_alone() -> None:
    spec = ShardSpec("a.weight", (40, 50))
    first = initial(spec)
    parameters = [empty_parameter(s) for s in (ShardSpec("b.weight", (40, 50)), spec)]
    torch.manual_seed(77)
    initialize_parameters(parameters, 1)
    assert torch.equal(parameters[1].detach(), first)
    assert not torch.equal(parameters[0].detach(), first)
    assert not torch.equal(initial(spec, seed=2), first)
    state = torch.get_rng_state()
    initial(spec)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone


def test_every_dtype_has_the_same_values() -> None:
    spec = ShardSpec("w", (30, 40))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(initial(spec, dtype=dtype), initial(spec).to(dtype))


def test_initial_distribution() -> None:
    spec = ShardSpec("w", (3000, 100), std=0.02)
    values = initial(spec).double() / 0.02
    n = values.numel()
    assert abs(values.mean()) < 4 / math.sqrt(n)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(values.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    # Blocks of rows are not copies of each other.
    assert abs((values[:1000] * values[1024:2024]).mean()) < 4 / math.sqrt(1000 * 100)
    inits: tuple[tuple[Init, float], ...] = (("zeros", 0.0), ("ones", 1.0))
    for init, value in inits:
        assert (initial(ShardSpec("w", (5, 6), init=init)) == value).all()


def test_meta_parameters_are_passed_over() -> None:
    parameter = empty_parameter(ShardSpec("w", (10**6, 10**6)), device="meta")
    initialize_parameters([parameter], 1)
    assert parameter.is_meta


def test_derived_seeds_are_different_and_fixed() -> None:
    names = [(1, "a"), (1, "b"), (2, "a"), (12, "a"), (1, "2/a"), (1, "a", 0), (1, "a", 1)]
    seeds = [derive_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    # Runs are resumed by later versions: the numbers must stay. This one is from coreutils' `b2sum -l 64`.
    assert derive_seed(1234, "layers.0.mlp.up.weight", 0) == 2016337835055575026


# Dropout


def mix(x: int) -> int:
    """lowbias32 on unsigned integers, from its published constants."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def is_kept(seed: int, site: int, sample: int, position: int, column: int, p: float) -> bool:
    """One decision in plain integers."""
    base = derive_seed(seed, "dropout", site) & 0xFFFFFFFF
    sample_key = mix((sample & 0xFFFFFFFF) ^ base ^ (sample >> 32))
    row = mix(sample_key ^ mix(position))
    return (mix((row + column * 0x9E3779B1) & 0xFFFFFFFF) & 0x7FFFFFFF) >= round(p * 0x80000000)


def test_decisions_equal_the_definition_one_by_one() -> None:
    samples, p = [0, 1, 2**31 + 5, 2**40 + 3], 0.4
    x = torch.ones(5, 4, 6, dtype=torch.float64)
    out = dropout(x, p, DropoutKeys(11, torch.tensor(samples), 7), site=3)
    for position in range(5):
        for b, sample in enumerate(samples):
            for column in range(6):
                kept = is_kept(11, 3, sample, 7 + position, column, p)
                assert out[position, b, column].item() == pytest.approx(1 / (1 - p) if kept else 0.0)


def masks(seed: int = 1, site: int = 0, samples: range = range(64), length: int = 64, columns: int = 64) -> Tensor:
    """``[s, b, h]`` of kept (1) and dropped (0) at p = 0.5."""
    keys = DropoutKeys(seed, torch.tensor(list(samples)))
    return dropout(torch.ones(length, len(samples), columns, dtype=torch.float64), 0.5, keys, site) / 2


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_and_expectation(p: float) -> None:
    x = torch.ones(200, 50, 100, dtype=torch.float64)
    out = dropout(x, p, DropoutKeys(5, torch.arange(50)), site=1)
    n = x.numel()
    dropped = (out == 0).double().mean().item()
    assert abs(dropped - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert abs(out.mean().item() - 1) < 4 * math.sqrt(p / (1 - p) / n)
    # Also along each dim by itself: no row, sample or channel is favoured.
    for dim in range(3):
        rates = (out == 0).double().mean(dim=[d for d in range(3) if d != dim])
        deviations = (rates - p) / math.sqrt(p * (1 - p) / (n // len(rates)))
        assert abs(deviations.square().mean() - 1) < 5 * math.sqrt(2 / len(rates)) and deviations.abs().max() < 5


def test_decisions_are_independent() -> None:
    one = masks() - 0.5
    n = one.numel()

    def correlation(a: Tensor, b: Tensor) -> float:
        return (a * b).mean().item() * 4

    for other in (masks(site=1), masks(seed=2), masks(samples=range(64, 128)), masks(samples=range(2**32, 2**32 + 64))):
        assert abs(correlation(one, other - 0.5)) < 5 / math.sqrt(n)
    for dim in range(3):
        for shift in (1, 2, 3, 8, 16, 32):
            kept = one.shape[dim] - shift
            a, b = one.narrow(dim, 0, kept), one.narrow(dim, shift, kept)
            assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel()), (dim, shift)
    rows = one.flatten(0, 1)
    assert len(rows.unique(dim=0)) == len(rows)


def test_a_part_of_the_sequence_or_batch_drops_the_same_elements() -> None:
    x = torch.randn(12, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = torch.tensor([9, 4, 7, 100, 3, 2])
    whole = dropout(x, 0.3, DropoutKeys(5, samples), 2)
    for size in (1, 2, 3, 4, 6):
        parts = [dropout(x[o : o + size], 0.3, DropoutKeys(5, samples, o), 2) for o in range(0, 12, size)]
        assert torch.equal(torch.cat(parts), whole)
    for cuts in ((0, 6), (0, 1, 6), (0, 2, 4, 6)):
        parts = [dropout(x[:, a:b], 0.3, DropoutKeys(5, samples[a:b]), 2) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_heads_of_an_attention_row_are_apart() -> None:
    """Attention numbers (head, key) as one column; heads must not repeat each other's masks."""
    rows = DropoutKeys(3, torch.arange(8)).row_keys(1, 32, 0).t()
    heads = [keep_mask(rows, torch.arange(32) + head * 32, 0.5).double() - 0.5 for head in range(6)]
    for a, b in combinations(heads, 2):
        assert abs((a * b).mean()) * 4 < 5 / math.sqrt(a.numel())


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero() -> None:
    x = torch.randn(3, 2, 4)
    assert dropout(x, 0.5, None, 0) is x
    assert dropout(x, 0.0, DropoutKeys(1, torch.arange(2)), 0) is x


def test_gradient_is_dropped_like_the_value() -> None:
    x = torch.ones(8, 4, 16, dtype=torch.float64, requires_grad=True)
    out = dropout(x, 0.3, DropoutKeys(1, torch.arange(4)), 0)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    low = dropout(torch.ones(4, 4, 16, dtype=torch.bfloat16), 0.3, DropoutKeys(1, torch.arange(4)), 0)
    assert low.dtype == torch.bfloat16
