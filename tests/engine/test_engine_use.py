"""Using an engine: looking inside, the order of calls, accumulation by hand, half precision, models without memory."""

from __future__ import annotations

import atexit
from pathlib import Path

import pytest
import torch
from engine_cases import Case, model, plain, schedule
from engine_more import (
    deferred,
    half_precision,
    looking_inside,
    message,
    models_without_memory,
    order_of_calls,
    rest_of_an_epoch,
    weights_of_another_shape,
    what_has_no_initialisation,
)
from safetensors.torch import save_file
from test_engine_parity import differs
from torch import nn

import megatron_ds
from megatron_ds.config.engine import EngineConfig
from megatron_ds.engine import assemble
from megatron_ds.testing import run_ranks


@pytest.mark.parametrize("world_size", [1, 2])
def test_whole_tensors_can_be_read_and_set(world_size: int) -> None:
    for stage in (1, 3):
        rows = run_ranks(looking_inside, world_size, stage)
        for found in rows:
            assert found["steps"] == 1 and found["keys"] == sorted(model().state_dict())
            assert found["read"] == [True, True] and found["state"] == [True, True]
            assert "no parameter 'twice.wait'; did you mean 'twice.weight'" in found["unknown"]
            assert "has no 'exp_average'; did you mean 'exp_avg'" in found["kind"]
            assert "has shape [8, 8], the value [8]" in found["shape"]
            assert "between the last backward() of a step and step()" in found["early"]
            total = found["table"].splitlines()[-1].split()
            assert sum(int(number.replace(",", "")) for number in total[1:]) == found["bytes"]
            assert found["loss"] == rows[0]["loss"]


def test_wrong_orders_of_calls_say_what_is_right() -> None:
    for found in run_ranks(order_of_calls, 2):
        assert "not loss.backward()" in found["nothing"]
        assert "0-d loss, not one of shape [2]" in found["vector"]
        assert "in the middle of a step of 1 micro-batches" in found["train_batch"]
        assert "step() takes no closure" in found["closure"]
        assert "after the last of accumulation=3 micro-batches" in found["extra"]
        assert "got 1 micro-batches where accumulation=3" in found["few"]
        assert found["loss"] == "none"
        assert "did not return a loss" in found["no loss"]


def test_no_sync_and_a_partial_step_are_means_over_what_there_was() -> None:
    want = plain(Case("AdamW", scheduler=True), steps=2)
    one = plain(Case("SGD"), steps=1)
    for stage in (1, 2, 3):
        case = Case("AdamW", stage)
        for losses, parameters in [deferred(case), *run_ranks(deferred, 2, case)]:
            assert losses == pytest.approx(want.losses, rel=1e-12)
            assert all(differs(parameters[name], value) < 1e-9 for name, value in want.parameters.items())
    for loss, parameters in run_ranks(rest_of_an_epoch, 2):
        assert loss == pytest.approx(one.losses[0], rel=1e-12)
        assert all(differs(parameters[name], value) < 1e-9 for name, value in one.parameters.items())


def test_half_precision_has_master_weights_and_a_loss_scale() -> None:
    bf16 = half_precision("bf16")
    assert bf16["dtype"] == "torch.bfloat16" and bf16["moved"] and not any(bf16["skipped"])
    assert bf16["losses"][-1] < bf16["losses"][0]
    fp16 = half_precision("fp16")
    assert fp16["dtype"] == "torch.float16" and fp16["moved"]
    assert fp16["skipped"][0] and not fp16["skipped"][-1] and fp16["losses"][-1] < fp16["losses"][0]
    assert fp16["scales"][0] == 2.0**24 > fp16["scales"][-1]


def test_a_model_without_memory_begins_alike_on_any_ranks(tmp_path: Path) -> None:
    runs = []
    for world_size in (1, 2, 3):
        (tmp_path / str(world_size)).mkdir()
        for found in run_ranks(models_without_memory, world_size, str(tmp_path / str(world_size))):
            runs += found
    first, loss, empty = runs[0]
    assert all(empty)
    assert len({tensor.flatten()[0].item() for tensor in first.values()}) > 10  # nobody has another's values
    assert first["blocks.0.table"].tolist() == list(range(16))
    for state, other, _ in runs[1:]:
        assert other == pytest.approx(loss, rel=1e-5)
        assert all(torch.equal(state[name], value) for name, value in first.items())


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    assert "table is [1, 4], and the model's is [4, 4]; give the weights" in weights_of_another_shape(str(tmp_path))


def test_a_folder_of_weights_has_buffers_too(tmp_path: Path) -> None:
    saved = {name: torch.rand(3) for name in ("weight", "bias", "running_mean", "running_var")}
    saved["num_batches_tracked"] = torch.tensor(7)
    save_file(saved, tmp_path / "model.safetensors")
    with megatron_ds.empty_parameters():
        net = nn.BatchNorm1d(3)
    engine = megatron_ds.initialize(net, weights=tmp_path)
    state = engine.state_dict()
    assert state.keys() == saved.keys() and all(torch.equal(state[name], value) for name, value in saved.items())
    engine.close()


def test_what_cannot_initialise_itself_says_so() -> None:
    refused, filled = what_has_no_initialisation()
    assert "no reset_parameters(); give initialize() weights=" in refused and filled


def test_optimizer_and_model_have_to_be_of_one_another() -> None:
    net = model()
    other = torch.optim.SGD(model().parameters())
    assert "that is not the model's" in message(megatron_ds.initialize, net, None, other)
    some = torch.optim.SGD([net.inputs.weight])
    assert "inputs.bias, twice.weight" in message(megatron_ds.initialize, net, None, some)
    own = torch.optim.SGD([p for p in net.parameters() if p.requires_grad])
    assert "is of another optimizer" in message(megatron_ds.initialize, net, None, own, schedule(other))
    assert "(optimizer.lr)" in message(megatron_ds.initialize, net, {"optimizer": {"lr": 1.0}}, own)
    for cls, reason in ((torch.optim.LBFGS, "line search"), (torch.optim.Adafactor, "it keeps 'row_var'")):
        whole = cls([p for p in net.parameters() if p.requires_grad])  # type: ignore[operator]
        assert reason in message(megatron_ds.initialize, net, None, whole)


class OfAll(torch.optim.SGD):
    """Elementwise by name only: a step depends on the norm of all gradients."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            norm = sum(p.grad.square().sum() for p in group["params"]) ** 0.5
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad / norm * group["lr"])


def test_an_optimizer_of_ones_own_is_tried() -> None:
    net = torch.nn.Linear(2, 2)
    found = message(megatron_ds.initialize, net, None, OfAll(net.parameters(), lr=0.1))
    assert "OfAll cannot update sharded parameters" in found and "depends on the others" in found


def test_the_allocator_of_the_process_is_changed_only_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("map_large_tensors", "keep_freed_memory"):
        monkeypatch.setattr(f"megatron_ds.engine.assemble.{name}", lambda name=name: calls.append(name))
    for asked in (False, True):
        assert calls == []
        engine = megatron_ds.initialize(torch.nn.Linear(2, 1), {"device": "cpu", "keep_freed_memory": asked})
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 2)).sum())
            engine.step()
        engine.close()
    assert calls == ["map_large_tensors", "keep_freed_memory"]


def test_a_script_ends_after_the_threads_of_the_group_that_initialize_has_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """They abort a process that ends meanwhile, in some 3% of ends under load, which no test would see reliably."""
    done: list[str] = []
    place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(assemble, "connect", lambda *_: done.append("met"))
    monkeypatch.setattr(assemble, "init_process_group", lambda *_: done.append("group"))
    monkeypatch.setattr(atexit, "register", lambda call, *of: done.append(f"{call.__name__}{of}"))
    assemble.start_ranks(EngineConfig(device="cpu"))
    assert done == ["met", "group", "sleep(0.2,)"]
