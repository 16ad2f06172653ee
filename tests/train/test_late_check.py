"""Steps whose gradient norm the host reads one step late: the same weights, bit for bit, and the same checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from step_runs import configuration, plain, poison_second_forward, poisoned, several
from torch import Tensor

from megatron_ds.checkpoint.directory import read_meta, steps_in
from megatron_ds.config import RunConfig, from_dict
from megatron_ds.data.gpt_dataset import SyntheticDataset
from megatron_ds.data.loader import BatchLoader
from megatron_ds.mesh import Mesh
from megatron_ds.models.gpt import GPTTask
from megatron_ds.testing import run_ranks
from megatron_ds.train import step as step_module
from megatron_ds.train.build import build
from megatron_ds.train.callbacks import Callback, MetricsFile
from megatron_ds.train.loop import Loop
from megatron_ds.train.metrics import Speedometer
from megatron_ds.train.output import Output

Sections = dict[str, dict[str, Any]]
WARM = {"warmup_steps": 4, "schedule": "linear", "clip_norm": 0.1}
MOST: list[tuple[str, Sections, float]] = [
    ("fp64", {"optimizer": dict(WARM)}, math.inf),
    ("fp64", {"optimizer": {"name": "sgd", "momentum": 0.9, "clip_norm": 0.0}}, math.inf),
    ("bf16", {"optimizer": {**WARM}, "mesh": {"dp": 2}, "zero": {"stage": 2}}, math.nan),
    ("fp16", {"precision": {"loss_scale": 64.0}, "mesh": {"pp": 2}}, math.nan),
    ("bf16", {"optimizer": {"name": "muon", **WARM}, "mesh": {"tp": 2}}, math.inf),
]


def late(dtype: str, sections: Sections, is_late: bool) -> RunConfig:
    precision = {"dtype": dtype, **sections.get("precision", {})}
    return configuration(**{**sections, "precision": precision, "train": {"late_check": is_late}})


@pytest.mark.parametrize(("dtype", "sections", "bad"), MOST, ids=["adamw", "sgd", "bf16", "fp16", "muon"])
def test_weights_are_those_of_steps_that_wait(dtype: str, sections: Sections, bad: float) -> None:
    """Step 2 has a NaN or an Inf, and so no update; bias correction, average and warm-up go on from before it."""
    jobs = [(poisoned, late(dtype, sections, late_), 4, 0, 2, bad, "hidden") for late_ in (False, True)]
    world = math.prod(sections.get("mesh", {}).values())
    for want, got in run_ranks(several, world, jobs) if world > 1 else [several(jobs)]:
        assert [result.skipped for result in want.results] == [False, True, False, False]
        assert list(map(str, got.results)) == list(map(str, want.results))
        for step, (mine, others) in enumerate(zip(got.parameters, want.parameters, strict=True)):
            for name, tensor in others.items():
                assert torch.equal(mine[name], tensor), f"{name} after step {step}"


def test_the_norm_is_read_behind_the_next_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    config, done = late("fp64", {}, True), list[str]()
    wait = step_module._HostCopy.wait
    monkeypatch.setattr(step_module._HostCopy, "wait", lambda copy: (done.append("wait"), wait(copy))[1])
    for name in ("norm_squared", "step"):
        method = getattr(step_module.ZeroOptimizer, name)

        def noted(*arguments: Any, _name: str = name, _method: Any = method) -> Any:
            done.append(_name)
            return _method(*arguments)

        monkeypatch.setattr(step_module.ZeroOptimizer, name, noted)
    plain(config, 3)
    assert done == ["norm_squared", "step", *["norm_squared", "wait", "step"] * 2, "wait"]


def test_parameters_that_were_updated_less_often_stay_so() -> None:
    """Such as a checkpoint has them that were frozen for a while."""
    parts = build(late("fp32", {}, True), Mesh.single(), GPTTask(late("fp32", {}, True)))
    optimizer, found = parts.optimizer, []
    names = [name for update in optimizer._rules() for name in update.late(-1)][:3]
    optimizer.count = 5
    optimizer.load_late({names[0]: {"step": 2}, names[1]: {"step": 4}, names[2]: {"step": 3}})
    tensors = {slot.spec.name: p for b in optimizer.buckets for slot, p in zip(b.layout.slots, b.tensors)}
    for name in names[1:]:
        tensors[name].requires_grad_(False)
    for scale in (1.0, torch.tensor(math.nan)):
        parts.step.begin(torch.ones((), dtype=torch.float64))
        optimizer.start_backward(True)
        optimizer.end_backward()
        parts.step.reduce()
        optimizer.step(1e-3, scale)
        if scale != 1.0:
            optimizer.take_back()
        found.append((optimizer.count, optimizer.late()))
    want = 6, {names[0]: {"step": 3}, names[1]: {"step": 4}, names[2]: {"step": 3}}
    assert found == [want, want]


# Runs


@dataclass
class Poison(Callback):
    """A NaN in some steps; and a checkpoint of each moment that the run would keep."""

    loop: Loop | None = None
    steps: tuple[int, ...] = ()
    stop_before: int = 0
    told: list[str] = field(default_factory=list)

    def before_step(self, step: int) -> None:
        assert self.loop is not None
        if step in self.steps:
            poison_second_forward(next(iter(self.loop.runtime.stages[0].layers.values())), math.nan)
        if step == self.stop_before:
            self.loop.ask_to_stop()

    def on_message(self, text: str) -> None:
        self.told.append(text)


def run(folder: Path, is_late: bool, bad: tuple[int, ...], stop_before: int = 0, resume: bool = False) -> Poison:
    config = late("bf16", {"optimizer": {"ema_decay": 0.9, **WARM}}, is_late).to_dict()
    config["train"] |= {"steps": 7, "eval_every": 5}
    config = from_dict(RunConfig, {**config, "checkpoint": {"save_every": 3}, "output": str(folder)}, "test")
    mesh = Mesh.single()
    parts = build(config, mesh, GPTTask(config))
    poison = Poison(steps=bad, stop_before=stop_before)
    folder.mkdir(exist_ok=True)
    loader = BatchLoader(SyntheticDataset(61, 16), 4, 1, prefetch=0)
    metrics = MetricsFile(folder / "metrics.jsonl", poison.on_message)
    speed = Speedometer(1.0, 1, None)
    loop = Loop(config, mesh, parts, loader, Output(folder), speed, lambda: [], callbacks=[poison, metrics])
    poison.loop = loop
    if resume:
        loop.resume()
    loop.run()
    return poison


def lines(folder: Path) -> list[dict[str, Any]]:
    ours = ("step", "loss", "grad_norm", "learning_rate", "targets", "loss_scale", "skipped")
    return [{key: line[key] for key in ours} for line in map(json.loads, (folder / "metrics.jsonl").open())]


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every checkpoint."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("checkpoints/step-*/*.safetensors"))
    return {f"{f.parent.name}/{f.stem}/{name}": t for f in files for name, t in load_file(f).items()}


def same_checkpoints(one: Path, other: Path) -> None:
    mine, others = weights(one), weights(other)
    assert mine.keys() == others.keys() and mine
    assert all(torch.equal(mine[name], tensor) for name, tensor in others.items())
    for path in steps_in(one / "checkpoints"):
        kept = [read_meta(folder / path.relative_to(one)) for folder in (one, other)]
        for meta in kept:
            meta.pop("config")
        assert kept[0] == kept[1]


@pytest.mark.parametrize("bad", [(3, 4, 7), (5,)], ids=str)
def test_a_run_keeps_the_same_checkpoints_and_lines(tmp_path: Path, bad: tuple[int, ...]) -> None:
    """Also where the step before a checkpoint is the one that was skipped: its checkpoint is put off."""
    told = [run(tmp_path / name, name == "late", bad).told for name in ("late", "waiting")]
    assert [text.replace("late", "waiting") for text in told[0]] == told[1]
    assert [line["skipped"] for line in lines(tmp_path / "late")] == [step in bad for step in range(1, 8)]
    assert lines(tmp_path / "late") == lines(tmp_path / "waiting")
    same_checkpoints(tmp_path / "late", tmp_path / "waiting")


def test_a_run_that_is_asked_to_stop_ends_one_step_later_and_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    run(tmp_path / "waiting", False, (4,))
    run(tmp_path / "late", True, (4,), stop_before=4)
    assert [line["step"] for line in lines(tmp_path / "late")] == [1, 2, 3, 4, 5]
    run(tmp_path / "late", True, (), resume=True)
    assert lines(tmp_path / "late") == lines(tmp_path / "waiting")
    (tmp_path / "late" / "checkpoints" / "step-00000005").rename(tmp_path / "the-one-of-the-stop")
    same_checkpoints(tmp_path / "late", tmp_path / "waiting")
