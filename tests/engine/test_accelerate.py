"""Accelerate's state, clipping and gradients on the engine: the numbers of plain torch, in float64, or one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_cases import (
    Clip,
    all_whole,
    automatic_names,
    by_hand,
    clipped_in_fp16,
    left_and_taken_up,
    mixed_precision,
    plain,
    prepared_again,
    refusals,
    settings_of_the_accelerator,
    taken_up,
    two_schedules,
)
from test_engine_parity import differs

from megatron_ds.errors import ConfigError
from megatron_ds.integrations.accelerate import prepare
from megatron_ds.testing import run_ranks

STAGE_3 = {"zero": {"stage": 3, "persistence_threshold": 20}}

# With what Accelerate knows: the loop's own batches, accumulation and clipping, and its mixed_precision.
DEEPSPEED = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
}


def check(got: Any, want: Any, first: int = 0) -> None:
    (losses, state), (wanted_losses, wanted) = got, want
    assert losses == pytest.approx(wanted_losses[first:], rel=1e-12)
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert differs(state[name], value) < 1e-9, name


@pytest.mark.parametrize("world_size", [1, 2])
def test_clipping_is_torchs_and_of_the_steps_that_ask_for_it(world_size: int) -> None:
    offloaded = {"zero": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    value: Clip = ("value", 0.05)
    cases: list[Any] = [
        ({"zero": {"stage": 0}}, value),
        ({"zero": {"stage": 2}}, value, 3),
        (STAGE_3, value),
        (offloaded, value),
        (STAGE_3, ("norm", 0.2), 3),
        ({"zero": {"stage": 2}}, None),
        (DEEPSPEED, ("norm", 0.2)),
    ]
    unclipped = plain(None)
    for results in run_ranks(all_whole, world_size, cases):
        for case, got in zip(cases, results, strict=True):
            want = plain(*case[1:])
            check(got, want)
            if case[1] is not None:
                assert differs(want[1]["first.weight"], unclipped[1]["first.weight"]) > 1e-3  # it does something


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loop_accumulates_by_itself(world_size: int) -> None:
    want = plain(None)
    for got in run_ranks(by_hand, world_size, STAGE_3):
        check(got, want)


def test_a_saved_state_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """On the ranks that saved it at another stage, and on one process."""
    want = plain(("norm", 0.5))
    for got in run_ranks(left_and_taken_up, 2, {"zero": {"stage": 2}}, STAGE_3, str(tmp_path / "state")):
        check(got, want, 3)
    (alone,) = run_ranks(taken_up, 1, {"zero": {"stage": 1}}, str(tmp_path / "state"))
    check(alone[:2], want, 3)
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert "engine" in names and not any(name.startswith(("model", "pytorch_model")) for name in names), names
    # The newest, and the newest that a good step followed: step 3 might yet turn out to have diverged.
    kept = sorted(path.name for path in (tmp_path / "state" / "engine").glob("step-*"))
    assert kept == ["step-00000002", "step-00000003"]


def test_what_is_prepared_again_is_what_it_was() -> None:
    want = plain(("norm", 0.5))
    for losses, state, said in run_ranks(prepared_again, 2, {"zero": {"stage": 2}}):
        check((losses, state), want)
        assert "Net was given to prepare() of an Accelerator that trains an engine" in said["other"]
        assert "nn.ModuleDict" in said["other"] and "requires_grad_(False)" in said["other"]
        assert "first.weight, first.bias, second.weight and 1 more: trained by an engine already" in said["again"]


def test_accelerates_names_and_limits_hold(tmp_path: Path) -> None:
    for names, steps in run_ranks(automatic_names, 2, str(tmp_path)):
        assert names == ["checkpoint_1", "checkpoint_2"] and steps == 3


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for found in run_ranks(refusals, 2, str(tmp_path)):
        assert found["save"].startswith("EngineError: save_state() after 1 of a step's micro-batches")
        assert "load_state() after 1 of a step's micro-batches" in found["load"]
        for key in ("direct", "read", "write"):
            assert found[key].startswith("ShardedGradientError: "), found[key]
            assert "engine.get_gradient('" in found[key] and "clip_grad_norm_" in found[key]
        assert "'second.weight'" in found["read"]
        assert found["harmless"] == "[1, 16] torch.float64 ShardedGradient(second.weight, shape=[1, 16])"
        assert "without first.weight, first.bias, second.bias, and the engine clips all or none" in found["some"]
        assert "without first.weight" in found["one"]
        assert "clip_value=0 leaves nothing" in found["zero"] and "only the L2 norm" in found["l1"]
        assert "use one of them" in found["both"]
        assert found["missing"].startswith("CheckpointError: ") and "engine" in found["missing"]
        assert "backward(inputs=) is not supported" in found["inputs"]
        assert "no state (moments), and these were taken of another optimizer; save" in found["moments"]
        assert "optimizer, after 1 updates, takes settings alone" in found["earlier"]
        assert "these were taken after 5 updates" in found["earlier"] and "load_state()" in found["earlier"]
        assert "were all in no_sync()" in found["local"] and "LocalSGD" in found["local"]
        assert "make an Accelerator for each model, or call accelerator.free_memory()" in found["second"]
        assert found["freed"] == "True"


def test_elements_are_clipped_at_their_own_size_whatever_the_loss_scale() -> None:
    once, scaled = clipped_in_fp16(1.0), clipped_in_fp16(1024.0)
    assert torch.equal(once, scaled) and once.abs().max() == 0.25


def test_a_loop_and_a_configuration_do_not_both_set_the_rate() -> None:
    (said,) = run_ranks(two_schedules, 1)
    assert "scheduler, WarmupLR, sets the learning rate of each update, and the script has made a torch" in said


def test_mixed_precision_is_the_accelerators() -> None:
    (found,) = run_ranks(mixed_precision, 1)
    assert found["bf16 0"] == "torch.bfloat16" and found["no 0"] == "torch.float32"
    assert "precision.dtype='fp32', but mixed_precision='bf16'" in found["bf16 1"]


def test_what_else_an_accelerator_was_told_is_done_or_refused() -> None:
    for refused, scales in run_ranks(settings_of_the_accelerator, 1):
        assert "to shard models itself, by FSDP, which an engine does here; leave that out" in refused["fsdp"]
        assert "has 2 ranks of which 1 have a batch each" in refused["tp"] and not refused["replicas"]
        assert "growth_factor=4, backoff_factor=0.5): the loss scale doubles" in refused["factor"]
        assert scales == [(256.0, 50, 1, True), (256.0, 7, 1, True), (1.0, scales[2][1], scales[2][2], False)]


def test_loaders_and_schedulers_are_named_where_they_do_not_belong() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader([1])  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    cases = {"DataLoader": (loader,), "DataLoader, LinearLR": (loader, scheduler), "dict, int": ({}, 1)}
    for named, more in cases.items():
        with pytest.raises(ConfigError, match=f"not {named}: give loaders to accelerator.prepare"):
            prepare(None, model, optimizer, *more)  # type: ignore[arg-type]  # refused before anything is used
