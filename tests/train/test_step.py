"""The train step: skipping on all ranks alike, precision, clipping, evaluation, and what it reports."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from step_runs import (
    Ran,
    S,
    Samples,
    configuration,
    decays,
    evaluating,
    gradients_and_update,
    is_finite,
    masked,
    norm_of,
    plain,
    poisoned,
    several,
    steps,
)
from torch import Tensor

from megatron_ds.config import RunConfig
from megatron_ds.data.loader import MicroBatch
from megatron_ds.mesh import Mesh
from megatron_ds.models.gpt import GPT
from megatron_ds.models.transformer import StageSettings
from megatron_ds.testing import run_ranks
from megatron_ds.train.build import RankRuntime

MESHES: list[dict[str, int]] = [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "pp": 2, "dp": 2}]


def world_size(mesh: dict[str, int]) -> int:
    return math.prod(mesh.values())


def same_everywhere(rans: list[Ran]) -> Ran:
    """All ranks report the same; the first one's report."""
    for ran in rans:
        for result, first in zip(ran.results, rans[0].results):
            assert str(result) == str(first)  # as text, so that NaN equals NaN
        assert ran.scales == rans[0].scales
    return rans[0]


def unchanged(ran: Ran, step: int) -> bool:
    before, after = ran.parameters[step - 1], ran.parameters[step]
    return all(torch.equal(before[name], after[name]) for name in before)


# Precision


# What each dtype's rounding allows of the loss and of the gradient norm.
TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (2e-2, 5e-2), "fp16": (3e-3, 1e-2)}


def precise(dtype: str, mesh: dict[str, int] | None = None) -> RunConfig:
    scale = {"initial_loss_scale": 256.0} if dtype == "fp16" else {}
    return configuration(dtype, mesh=mesh or {}, precision={"dtype": dtype, **scale})


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_lower_precision_equals_its_own_one_process_run(mesh: dict[str, int]) -> None:
    jobs = run_ranks(several, world_size(mesh), [(plain, precise(dtype, mesh), 3) for dtype in TOLERANCES])
    exact = plain(configuration("fp64"), 3)
    for index, (dtype, (loss, norm)) in enumerate(TOLERANCES.items()):
        many, one = same_everywhere([runs[index] for runs in jobs]), plain(precise(dtype), 3)
        for got, want, truth in zip(many.results, one.results, exact.results):
            assert not got.skipped and got.targets == want.targets
            assert got.loss == pytest.approx(want.loss, rel=loss), dtype
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=norm), dtype
            # And both are what the dtype allows of the true numbers.
            assert got.loss == pytest.approx(truth.loss, rel=loss), dtype
            assert want.loss == pytest.approx(truth.loss, rel=loss), dtype


def test_the_loss_scale_is_in_no_result_and_no_update() -> None:
    """With SGD, whose update shows a factor that Adam's would hide."""
    section = {"name": "sgd", "lr": 0.5, "clip_norm": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    exact = plain(configuration("fp32", optimizer=section), 2)
    for scale in (64.0, 1024.0):
        precision = {"dtype": "fp16", "loss_scale": scale}
        ran = plain(configuration("fp16", precision=precision, optimizer=section), 2)
        for result, want in zip(ran.results, exact.results):
            assert result.loss_scale == scale
            assert result.loss == pytest.approx(want.loss, rel=3e-3)
            assert result.grad_norm == pytest.approx(want.grad_norm, rel=1e-2)
        for name, start in exact.parameters[0].items():
            change, wanted = (r.parameters[2][name].float() - start for r in (ran, exact))
            assert (change - wanted).norm() < 0.05 * wanted.norm() + 1e-3 * start.norm(), name


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_fp16_overflow_is_skipped_on_all_ranks_alike(mesh: dict[str, int]) -> None:
    scale = {"precision": {"dtype": "fp16", "initial_loss_scale": 2.0**26, "loss_scale_hysteresis": 1}}
    count = 14
    config = configuration("fp16", mesh=mesh, train={"steps": 20}, optimizer={"warmup_steps": 3}, **scale)
    rans = run_ranks(plain, world_size(mesh), config, count)
    first = same_everywhere(rans)
    skipped = [result.skipped for result in first.results]
    assert skipped[0] and not skipped[-1]
    assert 2 <= sum(skipped) <= count - 2
    for step, result in enumerate(first.results, start=1):
        assert result.loss_scale == 2.0 ** (26 - sum(skipped[: step - 1]))
        updates = skipped[: step - 1].count(False)
        assert result.learning_rate == pytest.approx(1e-2 * min(1, (updates + 1) / 3)), (
            "a skipped step warms nothing up"
        )
        assert math.isfinite(result.grad_norm) != result.skipped
        assert math.isfinite(result.loss)
        for ran in rans:
            assert unchanged(ran, step) == result.skipped and is_finite(ran.parameters[step])
    one = plain(configuration("fp16", train={"steps": 20}, optimizer={"warmup_steps": 3}, **scale), count)
    # The edge of overflow may be one step off: the largest gradient is rounded differently.
    assert abs(sum(skipped) - sum(result.skipped for result in one.results)) <= 1


# NaN and Inf


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_what_one_rank_sees_alone_is_skipped_everywhere(mesh: dict[str, int]) -> None:
    world = world_size(mesh)
    cases = [(rank, value) for rank in sorted({0, world // 2, world - 1}) for value in (math.nan, math.inf)]
    config = configuration(mesh=mesh)
    jobs = run_ranks(several, world, [(poisoned, config, 3, rank, 2, value, "hidden") for rank, value in cases])
    for index, case in enumerate(cases):
        rans = [runs[index] for runs in jobs]
        assert [result.skipped for result in same_everywhere(rans).results] == [False, True, False], case
        for ran in rans:
            assert unchanged(ran, 2) and not unchanged(ran, 1) and not unchanged(ran, 3)
            assert is_finite(ran.parameters[3])


@pytest.mark.parametrize(
    "sections",
    [{"mesh": {"tp": 2, "sequence_parallel": False}}, {"mesh": {"dp": 2}, "zero": {"stage": 0}}],
    ids=["tp", "replicas"],
)
def test_a_nan_in_one_ranks_gradient_is_skipped_everywhere(sections: dict[str, dict[str, Any]]) -> None:
    """Also in its copy of a parameter that another rank owns, which the gradient norm does not count."""
    config = configuration(**sections)
    names = ("layers.1.mlp.up.weight", "layers.1.mlp_norm.weight")
    cases = [(rank, name) for rank in (0, 1) for name in names]
    jobs = run_ranks(several, 2, [(poisoned, config, 3, rank, 2, math.nan, name) for rank, name in cases])
    for index, case in enumerate(cases):
        rans = [runs[index] for runs in jobs]
        assert [result.skipped for result in same_everywhere(rans).results] == [False, True, False], case
        assert all(unchanged(ran, 2) and is_finite(ran.parameters[3]) for ran in rans)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_after_a_skipped_step_training_goes_on_as_if_its_batch_had_not_been(optimizer: str) -> None:
    """AdamW's bias correction counts updates, not steps."""
    config = configuration(optimizer={"name": optimizer, **({"momentum": 0.9} if optimizer == "sgd" else {})})
    ran = poisoned(config, 3, 0, 1, math.nan, "hidden")
    assert ran.results[0].skipped and unchanged(ran, 1)
    fresh = plain(config, 2, consumed=config.train.global_batch)
    assert ran.results[1:] == fresh.results
    for step in range(3):
        assert all(torch.equal(ran.parameters[step + 1][n], t) for n, t in fresh.parameters[step].items())


# The batch


@pytest.mark.parametrize("mesh", [{"dp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_a_rank_without_a_counted_token(mesh: dict[str, int]) -> None:
    config = configuration(mesh=mesh)
    first = same_everywhere(run_ranks(masked, world_size(mesh), config, 2, False))
    everything = same_everywhere(run_ranks(plain, world_size(mesh), config, 2))
    for some, all_ in zip(first.results, everything.results):
        assert 0 < some.targets < all_.targets
        assert math.isfinite(some.loss) and some.grad_norm > 0 and not some.skipped


def test_a_batch_without_a_counted_token_is_no_loss_and_no_gradient() -> None:
    ran = masked(configuration(optimizer={"weight_decay": 0.0}), 1, True)
    result = ran.results[0]
    assert (result.loss, result.grad_norm, result.targets, result.skipped) == (0.0, 0.0, 0, False)
    assert unchanged(ran, 1)


def test_loss_and_tokens_are_of_the_global_batch() -> None:
    """Initial loss from the model alone, over all four samples at once."""
    config = configuration()
    batch = {k: torch.from_numpy(v) for k, v in Samples(61, S, seed=1).batch(range(4)).items()}
    net = GPT(config.model, StageSettings(dtype=torch.float64))
    net.initialize(config.seed)
    mask = batch["loss_mask"]
    logits = net.eval().logits(batch)
    want = F.cross_entropy(logits[mask], batch["labels"][mask])
    for mesh in ({}, {"dp": 2}, {"pp": 2}):
        ranks = run_ranks(plain, max(1, world_size(mesh)), configuration(mesh=mesh), 1)
        result = same_everywhere(ranks).results[0]
        assert result.targets == int(mask.sum())
        assert result.loss == pytest.approx(want.item(), abs=1e-12)


# The update


def sgd(clip_norm: float, **optimizer: Any) -> RunConfig:
    section = {"name": "sgd", "lr": 0.5, "clip_norm": clip_norm, "weight_decay": 0.1, **optimizer}
    return configuration(optimizer=section)


def test_the_update_is_the_clipped_gradient() -> None:
    result, gradients, _ = gradients_and_update(sgd(0.0))
    assert result.grad_norm == pytest.approx(norm_of(gradients), rel=1e-12)
    decayed = decays(sgd(0.0))
    initial = plain(sgd(0.0), 0).parameters[0]
    for clip_norm in (0.0, result.grad_norm * 2, result.grad_norm / 3):
        factor = min(1.0, clip_norm / (result.grad_norm + 1e-6)) if clip_norm else 1.0
        clipped, same_gradients, change = gradients_and_update(sgd(clip_norm))
        assert clipped.grad_norm == result.grad_norm  # reported as it was before clipping
        for name, gradient in same_gradients.items():
            assert torch.equal(gradient, gradients[name])
            want: Tensor = -0.5 * (factor * gradient + (0.1 * initial[name] if decayed[name] else 0.0))
            torch.testing.assert_close(change[name], want, rtol=0, atol=1e-12, msg=name)


def test_the_learning_rate_of_the_schedule_is_used_and_reported() -> None:
    section = {"optimizer": {"lr": 1e-2, "schedule": "linear", "warmup_steps": 2}, "train": {"steps": 8}}
    rates = [result.learning_rate for result in plain(configuration(**section), 4).results]
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2 * 5 / 6, 1e-2 * 4 / 6])
    slow = sgd(0.0, warmup_steps=4, schedule="constant")
    _, _, change = gradients_and_update(slow)
    _, _, full = gradients_and_update(sgd(0.0, schedule="constant"))
    for name in full:
        torch.testing.assert_close(change[name] * 4, full[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 3])
def test_one_rank_that_asks_to_stop_stops_all(rank: int) -> None:
    rans = run_ranks(plain, 4, configuration(mesh={"pp": 2, "dp": 2}), 3, (rank, 2))
    assert [result.stop for result in same_everywhere(rans).results] == [False, True, False]


# Evaluation


@pytest.mark.parametrize("mesh", [{}, *MESHES[:3]], ids=str)
def test_evaluation_is_the_mean_over_tokens_and_changes_nothing(mesh: dict[str, int]) -> None:
    regularised: dict[str, Any] = {
        "model": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
        "train": {"label_smoothing": 0.2, "z_loss": 0.1},
    }
    config = configuration(mesh=mesh, **regularised)
    rans = run_ranks(evaluating, max(1, world_size(mesh)), config, 3)
    net = GPT(config.model, StageSettings(dtype=torch.float64))
    net.initialize(config.seed)
    batch = {k: torch.from_numpy(v) for k, v in Samples(61, S, seed=1).batch(range(12)).items()}
    mask = batch["loss_mask"]
    want = F.cross_entropy(net.eval().logits(batch)[mask], batch["labels"][mask]).item()
    for ran in rans:
        assert ran.evaluated[0] == pytest.approx(want, abs=1e-12)
        assert ran.evaluated[1] == ran.evaluated[2] != ran.evaluated[0]
        assert unchanged(ran, 1)
        # The step between was trained with its regularisation, as without an evaluation before it.
        trained = replace(ran.results[0])
        assert abs(trained.loss - want) > 0.1


def test_a_step_after_an_evaluation_is_the_step_without_it() -> None:
    config = configuration(model={"hidden_dropout": 0.2})
    ran, without = evaluating(config, 2), plain(config, 1)
    assert ran.results[0] == without.results[0]
    assert all(torch.equal(ran.parameters[2][name], tensor) for name, tensor in without.parameters[1].items())


def test_what_is_to_be_done_after_the_first_step_is_done_once() -> None:
    done: list[int] = []

    def ask(parts: RankRuntime, mesh: Mesh, step: int, batches: list[MicroBatch]) -> None:
        assert len(done) == min(step - 1, 1)
        if step == 1:
            parts.step.after_first = lambda: done.append(step)

    assert len(steps(configuration("fp64"), 3, ask).results) == 3
    assert done == [1]
