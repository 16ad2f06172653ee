"""Stop and resume: bit for bit on the same mesh, within float64 rounding on any other."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from started_ranks import arguments, pretrain_gpt

from megatron_ds.config import RunConfig, from_dict, validate
from megatron_ds.data.gpt_dataset import SyntheticDataset
from megatron_ds.data.loader import BatchLoader
from megatron_ds.errors import DataError
from megatron_ds.layers.recipe import OwnPrecision, use_recipe
from megatron_ds.mesh import Mesh
from megatron_ds.models.gpt import GPTTask
from megatron_ds.shard import ShardSpec
from megatron_ds.testing import device_of_rank, run_ranks
from megatron_ds.train.build import build
from megatron_ds.train.callbacks import Callback, MetricsFile
from megatron_ds.train.launch import run_main
from megatron_ds.train.loop import Loop
from megatron_ds.train.metrics import Speedometer
from megatron_ds.train.output import Output, check_settings
from megatron_ds.train.report import read_losses
from megatron_ds.train.step import StepResult


def said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: Path, *more: str) -> str:
    """The first words of a run of one process on what it goes on with."""
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *arguments(output, *more)])
    assert run_main(pretrain_gpt().main) == 0
    return capfd.readouterr().out.splitlines()[-1]


def test_a_resume_says_where_it_is_and_what_becomes_of_the_learning_rate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    common = ["--checkpoint.resume", "--optimizer.lr", "0.001", "--optimizer.min-lr", "0"]
    said(capfd, monkeypatch, run, *common, "--train.steps", "4")
    jumps = (
        "resumed from step 4 of 6, with other settings than before: train.steps: 4 -> 6; the learning rate goes from 0 "
        "to 6.7e-05, as its schedule ends at step 6 where it ended at 4 (--optimizer.decay-steps 4 keeps that)"
    )
    assert said(capfd, monkeypatch, run, *common, "--train.steps", "6") == jumps
    shown = [json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert shown[4] == pytest.approx(6.7e-5, rel=1e-2) and shown[3] == 0.0
    keeps = said(capfd, monkeypatch, run, *common, "--train.steps", "8", "--optimizer.decay-steps", "6")
    assert "resumed from step 6 of 8" in keeps and "learning rate" not in keeps
    over = said(capfd, monkeypatch, run, *common, "--train.steps", "3", "--optimizer.decay-steps", "6")
    assert over.startswith(f"nothing to do: the run in {run} is at step 8, and train.steps=3")
    assert len(read_losses(run)) == 8, "and what was recorded stays"
    same = said(capfd, monkeypatch, run, *common, "--train.steps", "3", "--optimizer.decay-steps", "6")
    assert same == f"nothing to do: the run in {run} is at step 8, and train.steps=3"


def test_damaged_metrics_are_said_and_damaged_settings_name_the_way_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    said(capfd, monkeypatch, run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(
        lines[0] + b"\xff\xfe\n" + lines[2].replace(b'"step": 3', b'"step": "3"') + lines[3][:9]
    )
    with pytest.raises(DataError, match="line 2 is damaged"):
        read_losses(run)
    own = ["--checkpoint.resume", "--train.steps", "5"]
    (run / "config.toml").write_bytes(b"\xff\xfe")
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *arguments(run, *own)])
    assert run_main(pretrain_gpt().main) == 2
    error = capfd.readouterr().err
    assert f"remove {run}/config.toml to resume without that" in error and "Traceback" not in error
    (run / "config.toml").unlink()
    os.mkfifo(run / "evaluation.jsonl")
    assert run_main(pretrain_gpt().main) == 2 and "it is a FIFO, not a regular file" in capfd.readouterr().err
    assert not (run / "config.toml").exists(), "a start that fails changes nothing"
    (run / "evaluation.jsonl").unlink()
    assert run_main(pretrain_gpt().main) == 0
    assert f"{run}/metrics.jsonl: 3 damaged or cut-off lines were dropped (line 2, 3, 4)\n" in capfd.readouterr().out
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 5]


FP8 = {"fp8": "blockwise", "fp8_block": 8, "fp8_emulate": True, "fp8_min_features": 0}
FEW_BITS = {"stage": 3, "quantized_weights": "int8", "quantized_gradients": "int4", "secondary_size": 2,
            "quantized_stochastic": True, "persistence_threshold": 0}  # fmt: skip


def configuration(output: Path, dtype: str, **mesh: int) -> RunConfig:
    """``dtype``: of the parameters. ``fp8``: products in it, ``sent``: what ZeRO sends in few bits, both of bf16;
    ``muon``: the optimizer, of fp32."""
    precision = {"dtype": "bf16", **(FP8 if dtype == "fp8" else {})} if dtype in ("fp8", "sent") else {"dtype": dtype}
    if dtype == "muon":
        precision = {}
    if dtype == "fp16":
        precision |= {"initial_loss_scale": 2.0**20, "loss_scale_window": 2}
    return from_dict(
        RunConfig,
        {
            "output": str(output),
            "model": {
                "num_layers": 4,
                "hidden_size": 32,
                "num_heads": 4,
                "kv_heads": 2,
                "vocab_size": 61,
                "vocab_multiple": 16,
                "position": "rope",
                "activation": "swiglu",
                "norm": "rmsnorm",
                "hidden_dropout": 0.1,
            },
            "mesh": mesh,
            "train": {"steps": 6, "global_batch": 4, "micro_batch": 1, "sequence_length": 16},
            "precision": precision,
            "zero": FEW_BITS if dtype == "sent" else {},
            "optimizer": {
                "lr": 1e-2,
                "warmup_steps": 2,
                "min_lr": 1e-3,
                "name": "muon" if dtype == "muon" else "adamw",
            },
            "checkpoint": {"resume": True},
            "data": {"synthetic": True},
        },
        "test",
    )


class StopAfter(Callback):
    """Asks to stop as a signal would, from rank 0 alone: the others must learn of it."""

    def __init__(self, loop: Loop, step: int):
        self.loop, self.step = loop, step

    def before_step(self, step: int) -> None:
        if step == self.step and dist.get_rank() == 0:
            self.loop.ask_to_stop()


class Fading(OwnPrecision):
    """Outputs shrink from product to product: a scale that later steps depend on."""

    scale: torch.Tensor

    def __init__(self, weight: ShardSpec):
        super().__init__()
        self.add_state(weight, "scale", torch.ones(1, dtype=torch.float64))

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.scale.mul_(0.995)
        return super().product(x, weight, bias) * self.scale


def train(config: RunConfig, stop_at: int, recipe: type[Fading] | None = None) -> tuple[int, dict[str, torch.Tensor]]:
    """Run or continue up to step ``stop_at``; returns where it started and every weight this rank holds."""
    world_size = dist.get_world_size()
    mesh = Mesh.create(validate(config, world_size), device_of_rank(dist.get_rank(), world_size))
    parts = build(config, mesh, GPTTask(config))
    if recipe is not None:
        for stage in parts.stages.values():
            use_recipe(stage, recipe)
    dataset = SyntheticDataset(config.model.vocab_size, config.train.sequence_length, config.seed)
    loader = BatchLoader(
        dataset, config.train.global_batch, config.train.micro_batch, mesh.dp.rank, mesh.dp.size, prefetch=0
    )
    output = Output(config.output)
    output.root.mkdir(parents=True, exist_ok=True)
    callbacks = [MetricsFile(output.metrics, print)] if mesh.rank == 0 else []
    loop = Loop(config, mesh, parts, loader, output, Speedometer(1.0, 1, None), None, callbacks)
    if output.has_checkpoint:
        loop.resume()
        if mesh.rank == 0:
            output.truncate_metrics(loop.step)
            assert loop.skipped == sum(line["skipped"] for line in metrics(output.root))
    start = loop.step
    loop.callbacks.append(StopAfter(loop, stop_at))
    loop.run()
    flat_shards = {f"{p.kind}/{p.name}/{p.start}": p.data.clone() for p in parts.optimizer.flat_shards(for_load=True)}
    return start, flat_shards


def metrics(output: Path) -> list[dict[str, Any]]:
    """What the step did, line by line; not how fast."""
    of_step = {"step", *(field.name for field in fields(StepResult) if field.name != "stop")}
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key in of_step} for line in lines]


def test_how_weights_are_quantised_is_said_where_they_are(tmp_path: Path) -> None:
    """The setting that says it had another default once, which the files of all runs of then have."""
    wanted = "precision.fp8_from_masters: False -> True"
    for dtype, said in (("bf16", []), ("fp8", [wanted])):
        config = configuration(tmp_path, dtype)
        before = config.to_dict()
        before["precision"]["fp8_from_masters"] = False
        assert check_settings(before, config, "run") == said
    before["precision"] |= {"fp8": "none"}
    assert wanted in check_settings(before, config, "run")


@pytest.mark.parametrize("dtype", ["muon", "bf16", "fp16", "fp8", "sent"])
def test_resume_on_the_same_mesh_is_bitwise(tmp_path: Path, dtype: str) -> None:
    mesh = {"dp": 4} if dtype == "sent" else {"tp": 2, "pp": 2}
    whole = run_ranks(train, 4, configuration(tmp_path / "whole", dtype, **mesh), 6)
    first = run_ranks(train, 4, configuration(tmp_path / "parts", dtype, **mesh), 3)
    second = run_ranks(train, 4, configuration(tmp_path / "parts", dtype, **mesh), 6)
    assert [start for start, _ in first] == [0] * 4
    assert [start for start, _ in second] == [3] * 4
    lines = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == lines and len(lines) == 6
    if dtype == "fp16":  # the scale moves on both sides of the stop, and a step before it was skipped
        scales = [line["loss_scale"] for line in lines]
        assert any(line["skipped"] for line in lines[:3]) and len(set(scales[:4])) > 1 < len(set(scales[3:])), scales
    for (_, want), (_, got) in zip(whole, second):
        assert want.keys() == got.keys()
        for name in want:
            assert torch.equal(want[name], got[name]), name


def test_the_state_of_a_recipe_is_resumed_on_another_mesh(tmp_path: Path) -> None:
    for folder, legs in (("whole", [({}, 6)]), ("parts", [({"pp": 2}, 2), ({"tp": 2}, 4), ({}, 6)])):
        for mesh, stop_at in legs:
            ranks = 1 if not mesh else 2
            run_ranks(train, ranks, configuration(tmp_path / folder, "fp64", **mesh), stop_at, Fading)
    whole = read_losses(tmp_path / "whole")
    assert read_losses(tmp_path / "parts") == pytest.approx(whole, rel=1e-9) and len(whole) == 6


MESHES = [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "pp": 2}, {"pp": 4}, {"dp": 4}, {"tp": 2, "pp": 2, "dp": 2}]


@pytest.fixture(scope="module")
def on_one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of six steps in one go."""
    folder = tmp_path_factory.mktemp("one")
    run_ranks(train, 1, configuration(folder, "fp64"), 6)
    return read_losses(folder)


@pytest.mark.parametrize("number", range(len(MESHES)))
def test_resume_on_another_mesh(tmp_path: Path, number: int, on_one_process: list[float]) -> None:
    """Six steps, each two on a mesh of its own, against six on one process."""
    for leg in range(3):
        mesh = MESHES[(number + 3 * leg) % len(MESHES)]
        ranks = mesh.get("tp", 1) * mesh.get("pp", 1) * mesh.get("dp", 1)
        starts = run_ranks(train, ranks, configuration(tmp_path / "many", "fp64", **mesh), 2 * leg + 2)
        assert {start for start, _ in starts} == {2 * leg}
    many = read_losses(tmp_path / "many")
    assert many == pytest.approx(on_one_process, rel=0, abs=1e-9) and len(many) == 6
