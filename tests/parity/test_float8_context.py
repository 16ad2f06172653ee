"""FP8 where context parallelism cuts the sequence: the operands of all products, bit for bit, and what they lead to.

Two MLPs, each a column and a row layer, on meshes with a ``cp`` axis. A rank takes two mirrored chunks of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from float8_faults import codes_scaled_by_this_rank, scales_of_this_cp_rank
from parity_run import TOLERANCE, Outcome, ParityError, assert_parity, parts_of, whole_part
from torch import Tensor, nn

from megatron_ds import comm
from megatron_ds.config import OptimizerConfig, PrecisionConfig, ZeroConfig
from megatron_ds.errors import ConfigError
from megatron_ds.kernels.float8 import Float8, spread
from megatron_ds.layers import float8_recipe as float8
from megatron_ds.layers.float8_layers import use_float8
from megatron_ds.layers.linear import RowParallelLinear
from megatron_ds.layers.mlp import MLP
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.rng import initialize_parameters
from megatron_ds.shard import ShardedDim, ShardSpec, spec_of
from megatron_ds.testing import run_ranks
from megatron_ds.zero.optimizer import ZeroOptimizer

S, B, H, FFN, SIDE, STEPS = 16, 4, 12, 24, 4, 2
"""No two of S, B, H, FFN and 2 x FFN are equal: an operand's dims are known by their sizes."""


ONE, CP, CP_TP, CP_DP = MeshShape(), MeshShape(cp=2), MeshShape(cp=2, tp=2), MeshShape(cp=2, dp=2)


@dataclass(frozen=True)
class Case:
    fp8: str
    shape: MeshShape = ONE
    zero: int = 0
    sequence_parallel: bool = False
    optimizer: str = "adamw"

    def __str__(self) -> str:
        mesh = "".join(f"{name}{getattr(self.shape, name)}" for name in ("dp", "cp", "tp"))
        return f"{self.fp8}-{mesh}-zero{self.zero}{'-sp' * self.sequence_parallel}-{self.optimizer}"


CASES = [
    Case("tensorwise", CP, zero=1),
    Case("rowwise", CP, optimizer="muon"),
    Case("blockwise", CP, zero=3),
    Case("tensorwise", CP_TP, sequence_parallel=True),
    Case("tensorwise", CP_TP, zero=3),
    Case("rowwise", CP_TP, zero=2, sequence_parallel=True),
    Case("rowwise", CP_TP, zero=1),
    Case("blockwise", CP_TP, zero=1, sequence_parallel=True),
    Case("blockwise", CP_TP, optimizer="muon"),
    Case("tensorwise", CP_DP, zero=2),
    Case("tensorwise", CP_DP),
    Case("rowwise", CP_DP, zero=3, optimizer="muon"),
    Case("rowwise", CP_DP, zero=1),
    Case("blockwise", CP_DP, zero=2, optimizer="muon"),
    Case("blockwise", CP_DP, zero=3),
]
FAULTS: Mapping[Case, Callable[[], Any]] = {
    Case("tensorwise", CP): scales_of_this_cp_rank,
    Case("rowwise", CP, zero=1): scales_of_this_cp_rank,
    Case("tensorwise", CP, zero=2): codes_scaled_by_this_rank,
}


@dataclass(frozen=True)
class Look:
    """Of one rank: its part of the samples, tokens and features, by the size of the dim, and in each step the operands
    of the products in order (codes and each one's scale), the output and the gradient of the input."""

    mine: dict[int, Tensor]
    operands: list[list[tuple[Tensor, Tensor]]]
    results: list[tuple[Tensor, Tensor]]
    outcome: Outcome


class MLPs(nn.Module):
    def __init__(self, tp: Axis, sequence_parallel: bool):
        super().__init__()
        make: dict[str, Any] = {"bias": True, "tp": tp, "sequence_parallel": sequence_parallel, "stds": (0.5, 0.5)}
        kinds = enumerate(("swiglu", "gelu_tanh"))
        self.layers = nn.ModuleList(MLP(f"layers.{i}", H, FFN, kind, **make, dtype=torch.float64) for i, kind in kinds)
        initialize_parameters(self.parameters(), 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def part(tokens: int, axis: Axis) -> Tensor:
    """The tokens of a context-parallel rank: one chunk from either end."""
    chunks = torch.arange(tokens).view(2 * axis.size, -1)
    return torch.cat((chunks[axis.rank], chunks[-1 - axis.rank]))


def settings(fp8: str) -> PrecisionConfig:
    block = {"fp8_block": SIDE} if fp8 == "blockwise" else {}
    return PrecisionConfig(fp8=fp8, fp8_min_features=0, fp8_emulate=True, **block)  # type: ignore[arg-type]


def random(seed: int) -> Tensor:
    """``[s, b, h]``, in which a token and a sequence have their own magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((S, B, H), (S, 1, 1), (1, B, 1))
    x, *exponents = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    for each in exponents:
        x = x * 4.0**each
    return x


@contextmanager
def seen(samples: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The operands of all products inside, of so many samples: activations ``[s, b, k]``, weights ``[n, k]`` and, for
    weight gradients, features ``[b, n, s]``."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(x: Float8, tokens: bool) -> None:
        scale = spread(x.scale, *x.values.shape[-2:], x.block).expand(x.values.shape)
        both = x.values.view(torch.uint8), scale
        sizes = (-1, samples, x.values.shape[-1]) if tokens else x.values.shape
        found.append(tuple(each.reshape(sizes).clone() for each in both))

    def watched(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(left: Float8, right: Float8, out: torch.dtype) -> Tensor:
            keep(left, left.values.dim() == 2)
            keep(right, False)
            return original(left, right, out)

        return call

    names = ("product", "sum_of_products")
    with patch.multiple(float8, **{name: watched(getattr(float8, name)) for name in names}):
        yield found


def take(case: Case, mesh: Mesh) -> Look:
    """The steps of a case on this rank."""
    model = MLPs(mesh.tp, case.sequence_parallel)
    use_float8(model, settings(case.fp8), mesh.cp)
    zero = ZeroOptimizer(
        model.named_parameters(),
        mesh,
        ZeroConfig(stage=case.zero, bucket_mb=0.004, persistence_threshold=0),
        OptimizerConfig(name=case.optimizer, lr=0.05, muon_dtype="fp64"),  # type: ignore[arg-type]
        root=model,
    )
    tokens, samples = part(S, mesh.cp), torch.arange(B).chunk(mesh.dp.size)[mesh.dp.rank]
    gate = ShardSpec("", (2, FFN), (ShardedDim.over(mesh.tp, 1),)).slice_of(torch.arange(2 * FFN).view(2, FFN))
    features = torch.arange(FFN).chunk(mesh.tp.size)[mesh.tp.rank]
    mine = {S: tokens, B: samples, H: torch.arange(H), FFN: features, 2 * FFN: gate.flatten()}
    own = tokens.chunk(mesh.tp.size)[mesh.tp.rank] if case.sequence_parallel else tokens
    counted = case.sequence_parallel or mesh.tp.is_first
    operands, results, scalars, gradients = [], [], [], []
    for step in range(STEPS):
        x, grad = (random(seed)[own][:, samples] for seed in (step, 100 + step))
        x.requires_grad_()
        zero.start_step()
        zero.start_backward(last=True)
        with seen(len(samples)) as found, float8.weights_kept(float8.recipes_of([model]), case.zero < 3):
            out = model(x)
            out.backward(grad)
        zero.end_backward()
        zero.finish_gradients()
        gradients.append(parts_of(zero.gradient_shards()))
        norm = comm.all_reduce(zero.norm_squared(), mesh.world).sqrt()
        loss = comm.all_reduce((out.detach() * grad).sum() * counted, mesh.world)
        scalars.append((loss.item(), norm.item()))
        zero.step(0.05)
        operands.append(found)
        results.append((out.detach(), x.grad.clone()))
    with zero.gathered(model.parameters()):
        parameters = [whole_part(spec_of(p), p) for p in model.parameters()]
    zero.close()
    return Look({**mine, 0: own}, operands, results, Outcome(scalars, gradients, parameters, []))


def on_this_rank(cases: list[Case], faults: list[Case]) -> list[Look]:
    mesh = Mesh.create(cases[0].shape, torch.device("cpu"))
    looks = [take(case, mesh) for case in cases]
    for case in faults:
        with FAULTS[case]():
            looks.append(take(case, mesh))
    return looks


@cache
def job(shape: MeshShape) -> dict[Case, list[Look]]:
    cases, faults = ([case for case in every if case.shape == shape] for every in (CASES, FAULTS))
    ranks = run_ranks(on_this_rank, shape.world_size, cases, faults)
    return dict(zip([*cases, *faults], zip(*ranks, strict=True), strict=True))


@cache
def one_process(fp8: str, optimizer: str) -> Look:
    return take(Case(fp8, optimizer=optimizer), Mesh.single())


def check_operands(case: Case) -> None:
    want = one_process(case.fp8, case.optimizer)
    assert all(len(step) == 2 * 4 * 3 for step in want.operands)
    for rank, look in enumerate(job(case.shape)[case]):
        for step, (ours, whole) in enumerate(zip(look.operands, want.operands, strict=True)):
            for number, (one, two) in enumerate(zip(ours, whole, strict=True)):
                index = np.ix_(*(look.mine[size].numpy() for size in two[0].shape))
                for what, got, wanted in zip(("codes", "scales"), one, two):
                    assert np.array_equal(got.numpy(), wanted.numpy()[index]), (
                        f"{what} of operand {number} of step {step + 1} on rank {rank}"
                    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_scale_and_code_is_that_of_one_process(case: Case) -> None:
    check_operands(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_gradients_and_updates_are_those_of_one_process(case: Case) -> None:
    want, looks = one_process(case.fp8, case.optimizer), job(case.shape)[case]
    for look in looks:
        for ours, whole in zip(look.results, want.results, strict=True):
            for got, wanted in zip(ours, whole):
                torch.testing.assert_close(got, wanted[look.mine[0]][:, look.mine[B]], rtol=TOLERANCE, atol=TOLERANCE)
    assert_parity([look.outcome for look in looks], want.outcome)


@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_scales_of_a_part_of_the_sequence_show(case: Case) -> None:
    with pytest.raises(AssertionError, match=r"scales of operand|codes of operand"):
        check_operands(case)
    with pytest.raises(ParityError, match="first gradient that differs"):
        assert_parity([look.outcome for look in job(case.shape)[case]], one_process(case.fp8, case.optimizer).outcome)


def test_blocks_of_tokens_that_a_cp_rank_lacks_a_part_of_are_refused() -> None:
    """Two chunks of 6 tokens: the second block of 4 would have two tokens of each."""
    make: dict[str, Any] = {"bias": False, "tp": Axis("tp"), "sequence_parallel": False, "init_std": 1.0}
    layer = RowParallelLinear("down", FFN, H, **make, dtype=torch.float64)
    initialize_parameters(layer.parameters(), 1)
    cp = Mesh.described(CP, 0).cp
    for more in ({}, {"fp8_weight_gradient": False}):
        use_float8(layer, settings("blockwise").model_copy(update=more), cp)
        out = layer(torch.ones(12, 1, FFN, dtype=torch.float64))
        if more:
            out.sum().backward()
            continue
        with pytest.raises(ConfigError) as error:
            out.sum().backward()
        assert str(error.value) == (
            "precision.fp8='blockwise' with 12 tokens of a sequence on each of mesh.cp=2 ranks, in two chunks: a block "
            "of precision.fp8_block=4 tokens, for the weight gradient, would be cut; use a sequence length that is a "
            "multiple of 16 (2 x 2 x 4), precision.fp8='rowwise', or precision.fp8_weight_gradient=false"
        )
