"""Muon against the closed form of its iteration and against torch's; tests/parity runs it on every mesh."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ds.config import OptimizerConfig
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Axis
from megatron_ds.optim.factory import as_rule
from megatron_ds.optim.muon import COEFFICIENTS, MOMENTUM, MuonRule, orthogonalize, size_factor
from megatron_ds.optim.rule import OptimizerSegment
from megatron_ds.shard import WHOLE, Matrices, ShardedDim, ShardSpec

F64 = torch.float64


def random(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F64).to(dtype)


def closed_form(matrix: Tensor, steps: int) -> Tensor:
    """An odd polynomial of a matrix has the matrix's singular vectors and the polynomial of its singular values."""
    u, s, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(6, 6), (4, 11), (13, 3), (1, 7)], ids=str)
@pytest.mark.parametrize("steps", [1, 5])
def test_the_iteration_is_a_polynomial_of_the_singular_values(shape: tuple[int, int], steps: int) -> None:
    matrix = random(*shape)
    torch.testing.assert_close(orthogonalize(matrix, steps, F64), closed_form(matrix, steps), rtol=0, atol=1e-12)


def test_the_singular_values_end_near_one_and_zero_stays_zero() -> None:
    values = torch.linalg.svdvals(orthogonalize(random(24, 40), 5, F64))
    assert values.min() > 0.6 and values.max() < 1.3
    assert not orthogonalize(torch.zeros(3, 4), 5, torch.float32).any()


def segment(name: str, master: Tensor, kinds: tuple[str, ...], weight_decay: bool = True) -> OptimizerSegment:
    return OptimizerSegment(
        master.clone(),
        torch.zeros_like(master),
        {kind: torch.zeros_like(master) for kind in kinds},
        weight_decay,
        name,
    )


def rule_of(config: OptimizerConfig, *specs: ShardSpec) -> MuonRule:
    parameters = []
    for spec in specs:
        parameter = torch.nn.Parameter(torch.empty(spec.global_shape, device="meta"))
        parameter.shard = spec  # type: ignore[attr-defined]
        parameters.append(parameter)
    rule = as_rule(config, parameters, Axis("tp"))
    assert isinstance(rule, MuonRule)
    return rule


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16)], ids=str)
def test_five_updates_are_torchs(shape: tuple[int, int], nesterov: bool, adjust: str) -> None:
    """Which iterates in bf16, always: as ours does unless told otherwise."""
    config = OptimizerConfig(
        name="muon",
        lr=0.02,
        weight_decay=0.1,
        muon_momentum=0.9,
        muon_nesterov=nesterov,
        muon_adjust=adjust,  # type: ignore[arg-type]
    )
    theirs = torch.nn.Parameter(random(*shape, dtype=torch.float32))
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust)
    ours = segment("w", theirs.detach(), (MOMENTUM,))
    update = rule_of(config, ShardSpec("w", shape, matrices=WHOLE)).over([ours])
    for step in range(5):
        gradient = random(*shape, dtype=torch.float32) * (step + 1)
        theirs.grad = gradient / 4
        torchs.step()
        ours.gradient.copy_(gradient)
        update.step(0.02, 0.25)  # clipping, before the momentum
    torch.testing.assert_close(ours.master, theirs.detach(), rtol=1e-6, atol=1e-6)


def test_fused_weights_are_several_matrices() -> None:
    """Queries, keys and values of [kv heads, q + k + v, d, in], by the global shape."""
    config = OptimizerConfig(name="muon", lr=1.0, weight_decay=0.0, muon_momentum=0.0, muon_nesterov=False)
    config = config.model_copy(update={"muon_dtype": "fp64"})
    shape = (3, 4, 2, 10)
    fused = segment("qkv", torch.zeros(shape, dtype=F64), (MOMENTUM,))
    fused.gradient.copy_(random(*shape))
    gradient = fused.gradient.clone()
    rule_of(config, ShardSpec("qkv", shape, matrices=Matrices(1, (2, 1, 1)))).over([fused]).step(1.0)
    for begin, end in ((0, 2), (2, 3), (3, 4)):
        matrix = gradient[:, begin:end].reshape(-1, 10)
        want = -closed_form(matrix, 5) * size_factor(*matrix.shape, "match_rms_adamw")
        torch.testing.assert_close(fused.master[:, begin:end].reshape(-1, 10), want, rtol=0, atol=1e-12)


def test_what_is_no_matrix_is_adamws() -> None:
    config = OptimizerConfig(name="muon", lr=0.1, weight_decay=0.3, beta1=0.8, beta2=0.9)
    rule = rule_of(config, ShardSpec("w", (4, 4), matrices=WHOLE), ShardSpec("embedding.weight", (4, 4)))
    assert rule.group_of("w").whole and rule.group_of("w").kinds == (MOMENTUM,)
    group = rule.group_of("embedding.weight")
    assert group.kinds == ("exp_avg", "exp_avg_sq") and not group.whole
    weight = torch.nn.Parameter(random(16, dtype=torch.float32))
    theirs = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.9), weight_decay=0.3)
    ours = segment("embedding.weight", weight.detach(), group.kinds)
    ours.gradient.copy_(random(16, dtype=torch.float32))
    weight.grad = ours.gradient.clone()
    theirs.step()
    rule.over([ours]).step(0.1)
    torch.testing.assert_close(ours.master, weight.detach(), rtol=1e-6, atol=1e-6)


def test_frozen_for_a_while_leaves_weight_and_momentum() -> None:
    update = rule_of(OptimizerConfig(name="muon"), ShardSpec("w", (4, 4), matrices=WHOLE)).over(
        [frozen := segment("w", random(4, 4), (MOMENTUM,))]
    )
    before = frozen.master.clone()
    frozen.gradient.fill_(1.0)
    update.frozen = frozenset({"w"})
    update.step(0.1)
    assert torch.equal(frozen.master, before) and not frozen.state[MOMENTUM].any()


def test_an_update_is_as_large_as_adamws() -> None:
    """Liu et al. 2025: a root mean square of 0.2, whatever the size."""
    for shape in ((64, 16), (16, 64), (32, 32)):
        update = orthogonalize(random(*shape), 5, F64) * size_factor(*shape, "match_rms_adamw")
        rms = update.square().mean().sqrt().item()
        assert math.isclose(rms, 0.2, rel_tol=0.3)


EXACT = OptimizerConfig(name="muon", weight_decay=0.0, muon_momentum=0.0, muon_nesterov=False, muon_dtype="fp64")
QKV = Matrices(1, (2, 1, 1), heads=2)  # of [kv heads, queries + key + value, d, in]


def moved(config: OptimizerConfig, spec: ShardSpec, gradient: Tensor) -> Tensor:
    """By one update with a learning rate of -1."""
    part = segment(spec.name, torch.zeros_like(gradient), (MOMENTUM,))
    part.gradient.copy_(gradient)
    rule_of(config, spec).over([part]).step(-1.0)
    return part.master


def test_each_head_may_be_a_matrix() -> None:
    gradient = random(3, 4, 2, 10)
    got = moved(EXACT.model_copy(update={"muon_heads": True}), ShardSpec("qkv", (3, 4, 2, 10), matrices=QKV), gradient)
    for group in range(3):
        for head in range(4):
            want = closed_form(gradient[group, head], 5) * size_factor(2, 10, "match_rms_adamw")
            torch.testing.assert_close(got[group, head], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("matrices", "axis", "heads"),
    [(Matrices(leading=1), "ep", False), (Matrices(2, (3, 3), leading=1), "ep", False), (QKV, "tp", True)],
    ids=["experts", "gate and up of experts", "heads"],
)
def test_what_an_axis_puts_elsewhere_whole_is_updated_where_it_is(matrices: Matrices, axis: str, heads: bool) -> None:
    """Without a gather: a rule of another rank is not asked."""
    shape, config = (4, 4, 6, 5), EXACT.model_copy(update={"muon_heads": heads})
    gradient = random(*shape)
    want = moved(config, ShardSpec("w", shape, matrices=matrices), gradient)
    for index in range(2):
        spec = ShardSpec("w", shape, placements=(ShardedDim(0, axis, index, 2),), matrices=matrices)
        got = moved(config, spec, spec.slice_of(gradient).contiguous())
        torch.testing.assert_close(got, spec.slice_of(want), rtol=0, atol=1e-13)


def test_a_model_without_matrices_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"finds no matrix among 2 parameters \(table is the first\).*'adamw'"):
        rule_of(OptimizerConfig(name="muon"), ShardSpec("table", (4, 8)), ShardSpec("norm.weight", (8,)))


def test_matrices_cut_over_other_axes_than_tp_are_refused() -> None:
    config = OptimizerConfig(name="muon")
    cut = ShardSpec("experts.up", (4, 8, 6), placements=(ShardedDim(1, "ep", 0, 2),), matrices=Matrices(leading=1))
    with pytest.raises(ConfigError, match=r"experts.up is cut over mesh.ep, .* use optimizer.name='adamw'"):
        rule_of(config, cut)
    rule_of(config, ShardSpec("up", (8, 6), placements=(ShardedDim(0, "tp", 1, 2),), matrices=WHOLE))
