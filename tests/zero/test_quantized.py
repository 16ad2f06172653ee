"""Quantised collectives: the way of every number with an exact format, then the formats as they are.

With a format that loses nothing, every path (two levels, a second shard, replicas) has to equal one process.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zero_toy import STEPS, Case, Toy, reference, train

from megatron_ds import comm
from megatron_ds.comm import quantized_buffers
from megatron_ds.comm.quantized_buffers import Quantization
from megatron_ds.config import OptimizerConfig, ZeroConfig
from megatron_ds.config.zero import zero_faults
from megatron_ds.kernels.quantized_blocks import BLOCK, LARGEST, pack, unpack
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.shard import ShardSpec
from megatron_ds.testing import run_ranks
from megatron_ds.zero.optimizer import ZeroOptimizer

CASES = [
    Case(
        stage,
        accumulate,
        optimizer,
        2.0,
        bucket_mb=bucket_mb,
        weights="int8" if stage == 3 else "none",
        gradients=gradients,
        secondary=secondary,
        shard_size=shard_size,
        keep_whole=stage > 1 and accumulate == 3,
    )
    for (stage, gradients, secondary), (accumulate, optimizer, bucket_mb), shard_size in zip(
        product((1, 2, 3), ("int8", "int4"), (None, 2)),
        [(1, "adamw", 0.0006), (3, "sgd", 0.0001), (2, "whole", 1.0), (3, "mixed", 0.0006)] * 3,
        (None, None, 2, None, None, None) * 2,
    )
    if secondary is None or shard_size is None
] + [
    Case(3, 2, "adamw", secondary=2),
    Case(3, 2, "adamw", weights="int8", gradients="int8", secondary=4),  # one node alone
    Case(3, 1, "sgd", weights="fp8"),
    Case(2, 2, "adamw", gradients="int8", shard_size=2),
]


def exact_pack(x: Tensor, form: str, keys: Tensor | None = None) -> Tensor:
    return x.contiguous().view(torch.uint8)


def exact_unpack(data: Tensor, count: int, form: str, dtype: torch.dtype) -> Tensor:
    return data.contiguous().view(dtype)


def exact_bytes(count: int, form: str, dtype: torch.dtype) -> int:
    return count * dtype.itemsize


def with_an_exact_format(cases: list[Case]) -> list[Any]:
    """Ranks of all samples and of all parts of a sequence sum alike."""
    mesh = Mesh.create(MeshShape(dp=torch.distributed.get_world_size() // 2, cp=2), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        for name, other in (("pack", exact_pack), ("unpack", exact_unpack), ("packed_bytes", exact_bytes)):
            patch.setattr(quantized_buffers, name, other)
        return [train(case, mesh) for case in cases]


def test_every_way_is_that_of_one_process() -> None:
    assert len(CASES) > 10
    for rank, of_rank in enumerate(run_ranks(with_an_exact_format, 4, CASES)):
        for case, (norms, parameters) in zip(CASES, of_rank, strict=True):
            want_norms, want = reference(case)
            assert norms == pytest.approx(want_norms, rel=1e-12) and len(norms) == STEPS, f"rank {rank}, {case}"
            for name, tensor in want.items():
                error = (parameters[name] - tensor).abs().max().item() if tensor.numel() else 0.0
                assert error < 1e-12, f"rank {rank}, {case}: {name} is off by {error}"


NEAR = {"int8": 0.02, "fp8": 0.08, "int4": 0.25}


def as_it_is(cases: list[Case]) -> list[Any]:
    mesh = Mesh.create(MeshShape(dp=torch.distributed.get_world_size()), torch.device("cpu"))
    return [train(case, mesh) for case in cases]


def test_in_few_bits_ranks_agree_and_stay_near() -> None:
    cases = [case for case in CASES if case.optimizer == "sgd"] + [
        Case(1, 2, "sgd", gradients="int4", shard_size=2), Case(3, 2, "sgd", weights="fp8", gradients="int8")
    ]  # fmt: skip
    ranks = run_ranks(as_it_is, 4, cases)
    for number, case in enumerate(cases):
        want_norms, want = reference(case)
        found = [of_rank[number] for of_rank in ranks]
        form = max((f for f in (case.weights, case.gradients) if f != "none"), key=lambda f: NEAR[f])
        assert 0 < abs(found[0][0][0] / want_norms[0] - 1) < NEAR[form], f"{case}: the first norm"
        start = dict(Toy().named_parameters())
        moved = torch.cat([(tensor - start[name]).flatten() for name, tensor in want.items()]).norm()
        off = torch.cat([(found[0][1][name] - tensor).flatten() for name, tensor in want.items()]).norm()
        assert 0 < off <= 2 * NEAR[form] * moved, case
        for name in want:
            for other in found[1:]:
                assert torch.equal(found[0][1][name], other[1][name]), f"{case}: ranks differ in {name}"


def on_the_grid() -> None:
    """Each rank has a power of two times the same whole numbers, and so have the sums of all and of a node."""
    mesh = Mesh.create(MeshShape(dp=4), torch.device("cpu"))
    axis, node = mesh.data, mesh.split_data(2)
    generator = torch.Generator().manual_seed(0)
    for form, within in product(("int8", "int4"), (None, node)):
        most, size = int(LARGEST[form]), 4 * (2 * BLOCK + 12)
        whole = torch.randint(-most, most + 1, (size,), generator=generator).float()
        whole.view(4, -1)[:, ::BLOCK] = most  # the largest of each block
        how = Quantization(form, form, False, within)
        for quantised in (whole * 2**axis.rank, whole.double() * 2**axis.rank):
            plain, sums = quantised.clone(), [quantised.new_ones(size // 4) for _ in range(2)]
            comm.reduce_scatter_start(sums[0], plain.clone(), axis).wait()
            quantized_buffers.reduce_scatter_start(sums[1], quantised.clone(), True, axis, how).wait()
            assert torch.equal(sums[0], sums[1] - 1), (form, within)
            comm.all_reduce(plain, axis)
            assert torch.equal(quantized_buffers.sum_start(quantised, axis, how).wait(), plain), (form, within)
    for form, within in product(("int8", "fp8", None), (None, node)):
        buffers = quantized_buffers.QuantizedBuffers(axis, mesh.device, Quantization(form, None, False, within))
        memory = buffers.gathered(4 * 300, torch.bfloat16)
        numbers = torch.arange(300).remainder(13) - 6.0
        numbers[::BLOCK] = LARGEST[form or "int8"]
        assert memory.shard is not None
        memory.shard.copy_(numbers * 2**axis.rank)
        for _ in range(2):
            memory.all_gather_start(memory.shard).wait()
            assert torch.equal(memory.whole, torch.cat([numbers * 2**r for r in range(4)]).bfloat16()), (form, within)
            memory.free()


def test_on_the_grid_they_are_the_plain_collectives() -> None:
    run_ranks(on_the_grid, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", sorted(LARGEST))
def test_the_largest_number_stays_finite_and_an_overflow_does_not(form: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.tensor([[largest, 1.0], [-largest, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]], dtype=dtype)
    found = unpack(pack(rows, form), 2, form, dtype)
    assert torch.allclose(found[:2, 0], rows[:2, 0], rtol=1e-6) and (found[:2, 1] == 0).all()
    assert not found[2:].isfinite().any(), "an overflow is still seen"


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(20, 20, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().sum()


def shards_after_looking(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Masters and gathered weights after gathers, after writes into what was gathered, and after unfreezing."""
    mesh = Mesh.create(MeshShape(dp=2), torch.device("cpu"))
    model = Writes().to(dtype)
    model.layers[1].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.shard = ShardSpec(name, tuple(p.shape))
    config = ZeroConfig(stage=3, quantized_weights="int8", persistence_threshold=0)
    zero = ZeroOptimizer(model.named_parameters(), mesh, config, OptimizerConfig(), root=model)

    def masters() -> dict[str, Tensor]:
        found = {}
        for flat in zero.flat_shards():
            if flat.kind == "param":
                whole = torch.zeros(
                    flat.numel if hasattr(flat, "numel") else flat.stop - flat.start, dtype=torch.float64
                )
                whole.copy_(flat.tensor(None).flatten())
                found[f"{flat.name}:{flat.start}"] = whole
        return found

    exact = masters()
    seen: dict[str, Tensor] = {}
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda m, _, n=number: seen.update({f"layers.{n}.weight": m.weight.clone()}))
    with torch.no_grad():
        model(torch.ones(1, 20, dtype=dtype))
    with zero.gathered(model.parameters()):
        whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    looked = masters()
    with zero.gathered(model.parameters(), write=True), torch.no_grad():
        model.layers[0].weight[4] = 0.0  # type: ignore[index]
        model.layers[1].weight[3] = 2.0  # type: ignore[index]
    written = masters()
    model.layers[1].requires_grad_(True)
    zero.train_also(model.layers[1].parameters())
    zero.close()
    return [{"before": before, "exact": exact, "seen": seen, "whole": whole, "looked": looked, "written": written,
             "after": {name: p.detach().clone() for name, p in model.named_parameters()}}]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_rank_owns_stays_exact(dtype: torch.dtype) -> None:
    ranks = [found[0] for found in run_ranks(shards_after_looking, 2, dtype)]
    for found in ranks:
        assert found["exact"].keys() == found["looked"].keys() and found["exact"]
        for name, values in found["exact"].items():
            assert torch.equal(found["looked"][name], values), f"{name} has changed by being looked at"
        for name, values in found["before"].items():
            assert not torch.equal(found["seen"][name], values), "what a forward gathers is rounded"
            assert (found["seen"][name] - values).abs().max() <= values.abs().max() / 127
            assert torch.equal(found["seen"][name], ranks[0]["seen"][name]), "and alike on all ranks"
            assert torch.equal(found["whole"][name], values), "outside of a forward it is not"
            want = values.clone()
            row, value = (4, 0.0) if name == "layers.0.weight" else (3, 2.0)
            want[row] = value
            assert torch.equal(found["after"][name], want), f"{name} after close()"


class WritesInForward(Writes):
    """As a codebook does, alike on all ranks; in place, and in a way that no version counter sees."""

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if number == 1:
                layer.weight.data[3].mul_(1.5)  # type: ignore[operator, union-attr, index]
        return x.square().sum()


def packed_in_training(secondary: int | None, writes: bool, always: bool) -> tuple[list[int], list[Tensor]]:
    """How often a shard was quantised in each step of three micro-batches, and the weights after three steps."""
    mesh = Mesh.create(MeshShape(dp=2), torch.device("cpu"))
    model = (WritesInForward if writes else Writes)()
    for name, p in model.named_parameters():
        p.shard = ShardSpec(name, tuple(p.shape))  # type: ignore[attr-defined]
    config = ZeroConfig(stage=3, quantized_weights="int8", secondary_size=secondary, persistence_threshold=0)
    zero = ZeroOptimizer(model.named_parameters(), mesh, config, OptimizerConfig(), root=model)
    counts: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        counts[-1] += 1
        return pack(*arguments)

    start = quantized_buffers.QuantizedGathered._gather_start

    def as_if_changed(memory: Any, *arguments: Any) -> Any:
        memory._sent_version = -1
        return start(memory, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_buffers, "pack", counted)
        if always:
            patch.setattr(quantized_buffers.QuantizedGathered, "_gather_start", as_if_changed)
        for step in range(3):
            counts.append(0)
            zero.start_step()
            for micro_batch in range(3):
                x = torch.randn(3, 20, generator=torch.Generator().manual_seed(10 * step + micro_batch + mesh.rank))
                zero.start_backward(micro_batch == 2)
                model(x).backward()
                zero.end_backward()
            zero.finish_gradients()
            zero.step(0.01)
    zero.close()
    return counts, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("secondary", "writes"), [(None, False), (2, False), (None, True)])
def test_a_shard_is_quantised_once_a_step_and_after_a_write(secondary: int | None, writes: bool) -> None:
    kept = run_ranks(packed_in_training, 2, secondary, writes, False)
    anew = run_ranks(packed_in_training, 2, secondary, writes, True)
    for (counts, ours), (others, theirs) in zip(kept, anew, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if not writes:
            assert counts == [2, 2, 2], "one a unit"
        assert secondary is not None or others > counts


def written(mesh: Mesh, weights: str, secondary: int | None, keep: bool = False, looks: bool = False) -> list[Tensor]:
    """Weights after two steps of two micro-batches, with writes in each forward and between the steps."""
    model = WritesInForward()
    for name, p in model.named_parameters():
        p.shard = ShardSpec(name, tuple(p.shape))  # type: ignore[attr-defined]
    config = ZeroConfig(
        stage=3,
        quantized_weights=weights,  # type: ignore[arg-type]
        secondary_size=secondary,
        keep_whole=keep,
        persistence_threshold=0,
    )
    zero = ZeroOptimizer(model.named_parameters(), mesh, config, OptimizerConfig(), shared_memory=False, root=model)
    for step in range(2):
        zero.start_step()
        with zero.gathered(model.parameters()) if looks else nullcontext():
            pass
        for last in (False, True):
            x = torch.randn(3, 20, generator=torch.Generator().manual_seed(10 * step + last + 100 * mesh.rank))
            zero.start_backward(last)
            model(x).backward()
            zero.end_backward()
        zero.finish_gradients()
        zero.step(0.01)
        with zero.gathered(model.parameters(), write=True), torch.no_grad():
            model.layers[0].weight[2].mul_(2.0)  # type: ignore[operator, union-attr, index]
    zero.close()
    return [p.detach().clone() for p in model.parameters()]


def follows_what_is_written() -> None:
    mesh = Mesh.create(MeshShape(dp=4), torch.device("cpu"))
    for weights in ("none", "int8"):
        for ours, theirs in zip(written(mesh, weights, 2), written(mesh, weights, None), strict=True):
            rounding = 0.0 if weights == "none" else 3 * theirs.abs().max().item() / 127
            torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding)
    for keep in (False, True):
        seen, unseen = (written(mesh, "int8", 2, keep, looks) for looks in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(seen, unseen, strict=True)), "a look changes nothing"


def test_a_second_shard_follows_what_is_written() -> None:
    run_ranks(follows_what_is_written, 4)


def resumed(weights: str, stochastic: bool) -> list[bool]:
    """Whether a run that goes on from the shards of another equals that one, bit for bit."""
    mesh = Mesh.create(MeshShape(dp=4), torch.device("cpu"))
    config = ZeroConfig(stage=3, quantized_weights=weights, quantized_gradients="int8", secondary_size=2,  # type: ignore
                        quantized_stochastic=stochastic, persistence_threshold=0)  # fmt: skip

    def made() -> tuple[Writes, ZeroOptimizer]:
        model = Writes().to(torch.bfloat16)
        for name, p in model.named_parameters():
            p.shard = ShardSpec(name, tuple(p.shape))  # type: ignore[attr-defined]
        return model, ZeroOptimizer(model.named_parameters(), mesh, config, OptimizerConfig(), root=model)

    def train_on(model: Writes, zero: ZeroOptimizer, steps: range) -> None:
        for step in steps:
            zero.start_step()
            x = torch.randn(3, 20, generator=torch.Generator().manual_seed(100 * step + mesh.rank))
            zero.start_backward(True)
            model(x.to(torch.bfloat16)).backward()
            zero.end_backward()
            zero.finish_gradients()
            zero.step(0.01)

    one, two = made(), made()
    train_on(*one, range(2))
    for mine, theirs in zip(two[1].flat_shards(for_load=True), one[1].flat_shards(for_load=True), strict=True):
        mine.tensor(None).copy_(theirs.tensor(None))
    two[1].count = one[1].count
    for _, zero in (one, two):
        zero.refresh_parameters()
    for model, zero in (one, two):
        train_on(model, zero, range(2, 4))
    every = zip(one[1].flat_shards(), two[1].flat_shards(), strict=True)
    return [torch.equal(a.tensor(None), b.tensor(None)) for a, b in every]


@pytest.mark.parametrize(("weights", "stochastic"), [("int8", True), ("fp8", False)])
def test_a_resumed_run_goes_on_with_the_same_bits(weights: str, stochastic: bool) -> None:
    for equal in run_ranks(resumed, 4, weights, stochastic):
        assert all(equal) and len(equal) >= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 2, "quantized_weights": "int8"}, "zero.quantized_weights='int8' does nothing: with zero.stage=2"),
        ({"stage": 0, "quantized_gradients": "int4"}, "zero.quantized_gradients='int4' does nothing: zero.stage=0"),
        ({"stage": 3, "quantized_weights": "fp8", "shard_size": 1}, "sharded over one rank, which sends nothing"),
        ({"stage": 2, "quantized_stochastic": True}, "zero.quantized_stochastic does nothing"),
        ({"stage": 2, "secondary_size": 2}, "zero.secondary_size=2 does nothing with zero.stage=2"),
        ({"stage": 3, "secondary_size": 3}, "zero.secondary_size=3 does not divide dp=8; use one of 2, 4, 8"),
        ({"stage": 3, "secondary_size": 2, "shard_size": 4}, "both group the ranks; use one"),
        (
            {"stage": 3, "secondary_size": 2, "offload_parameters": {"device": "cpu"}},
            "leave out zero.quantized_weights",
        ),
    ],
)
def test_settings_that_would_do_nothing(settings: dict[str, Any], message: str) -> None:
    assert any(message in fault for fault in zero_faults(ZeroConfig(**settings), 8)), settings


def test_every_setting_that_does_something_is_taken() -> None:
    for case in CASES:
        config = ZeroConfig(stage=case.stage, quantized_weights=case.weights, quantized_gradients=case.gradients,
                            secondary_size=case.secondary, shard_size=case.shard_size)  # fmt: skip
        assert not list(zero_faults(config, 4)), case
