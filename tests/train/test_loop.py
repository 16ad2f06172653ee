"""The loop: when it skips, evaluates, saves, stops, gives up; and its evaluation against a slow direct computation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from started_ranks import TINY, started

from megatron_ds.config import RunConfig, from_dict, parse
from megatron_ds.data.gpt_dataset import SyntheticDataset
from megatron_ds.data.gpt_sources import open_sources
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.loader import BatchLoader, to_tensors
from megatron_ds.errors import CheckpointError
from megatron_ds.mesh import Mesh
from megatron_ds.models.gpt import GPTTask
from megatron_ds.train import loop as loop_module
from megatron_ds.train.build import RankRuntime, build
from megatron_ds.train.callbacks import Callback
from megatron_ds.train.loop import Loop, TrainingDivergedError
from megatron_ds.train.metrics import Speedometer
from megatron_ds.train.output import Output
from megatron_ds.train.step import StepResult


class Recorder(Callback):
    """What a callback is told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.speeds: list[dict[str, float]] = []

    def on_start(self, step: int, total_steps: int, skipped: int) -> None:
        self.events.append(("start", step, total_steps, skipped))

    def on_step(self, step: int, result: StepResult, speed: Any) -> None:
        self.events.append(("step", step))
        self.speeds.append(dict(speed))

    def on_evaluation(self, step: int, loss: float) -> None:
        self.events.append(("evaluation", step))

    def on_message(self, text: str) -> None:
        self.events.append(("message", text))

    def on_end(self) -> None:
        self.events.append(("end",))


class Step:
    """Stands in for the train step: skips the given steps, and says stop one step after it was asked."""

    def __init__(self, skipped: Iterable[int] = ()):
        self.skipped = set(skipped)
        self.done, self.next_rate = 0, 1e-3

    def __call__(self, micro_batches: Any, stop: bool) -> StepResult:
        self.done += 1
        return StepResult(1.0, 1.0, 1e-3, 4, 1.0, self.done in self.skipped, stop)

    def evaluate(self, batches: Any) -> float:
        return float(len(list(batches)))


def scripted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: Iterable[int] = (), **sections: dict[str, Any]
) -> tuple[Loop, Recorder]:
    """A loop of 6 steps over a scripted step; what it saves appears among the recorder's events."""
    values: dict[str, Any] = {"train": {"steps": 6}, "data": {"synthetic": True}, "output": str(tmp_path)}
    config = from_dict(RunConfig, {**values, **sections}, "test")
    recorder = Recorder()

    def save(directory: Path, step: int, *rest: Any, **more: Any) -> Path:
        recorder.events.append(("save", step))
        return directory / f"step-{step}"

    monkeypatch.setattr(loop_module, "save", save)
    parts = SimpleNamespace(
        step=Step(skipped),
        optimizer=SimpleNamespace(count=0, flat_shards=lambda for_load: []),
        scaler=SimpleNamespace(state_dict=dict),
        executor=SimpleNamespace(where=lambda: ""),
        stages={},
    )
    loader = BatchLoader(SyntheticDataset(11, 4), 2, 1, prefetch=0)
    speed = Speedometer(1.0, 1, None, tokens=lambda samples, targets: 4 * samples)
    loop = Loop(
        config,
        Mesh.single(),
        cast(RankRuntime, parts),
        loader,
        Output(tmp_path),
        speed,
        lambda: [[]],
        callbacks=[recorder],
    )
    return loop, recorder


@pytest.mark.parametrize(("every", "steps"), [(2, [2, 4, 6]), (0, [])])
def test_copies_of_weights_are_compared_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, steps: list[int]
) -> None:
    loop, _ = scripted(tmp_path, monkeypatch, train={"steps": 6, "check_replicas_every": every})
    compared: list[int] = []
    monkeypatch.setattr(loop_module, "check_replicas", lambda zero, mesh: compared.append(loop.step))
    assert loop.run() and compared == steps


def events(recorder: Recorder, *kinds: str) -> list[tuple[Any, ...]]:
    return [event for event in recorder.events if event[0] in kinds]


def test_steps_evaluations_and_saves_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, told = scripted(
        tmp_path, monkeypatch, train={"steps": 5, "eval_every": 2}, checkpoint={"save_every": 3}, seed=1
    )
    assert loop.run()
    assert told.events == [
        ("start", 0, 5, 0),
        *[("step", 1), ("step", 2), ("evaluation", 2), ("step", 3), ("save", 3)],
        *[("step", 4), ("evaluation", 4), ("step", 5), ("evaluation", 5), ("save", 5)],
        *[("message", f"saved step 5 in {tmp_path}/checkpoints/step-5"), ("end",)],
    ]


def test_the_speed_of_a_step_is_its_own_and_not_that_of_the_start_or_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, told = scripted(tmp_path, monkeypatch, train={"steps": 3, "eval_every": 1})
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def takes(seconds: float, result: Any = None) -> Any:
        clock[0] += seconds
        return result

    real = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *arguments: takes(2.0, real(*arguments)))
    monkeypatch.setattr(Step, "evaluate", lambda *_: takes(30.0, 1.0))

    class Slow(Callback):
        def on_start(self, step: int, total_steps: int, skipped: int) -> None:
            takes(100.0)

    loop.callbacks.append(Slow())
    assert loop.run()
    for speed in told.speeds:
        assert speed["seconds"] == 2.0
        # Two sequences of four tokens, of which the scripted step counts four.
        assert speed["tokens_per_s"] == 4.0 and speed["targets_per_s"] == 2.0


def test_nothing_is_saved_at_the_end_where_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, told = scripted(tmp_path, monkeypatch, checkpoint={"save_at_end": False})
    assert loop.run() and not events(told, "save")


def test_so_many_skipped_steps_in_a_row_end_the_run_and_fewer_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = {"steps": 20, "max_skipped_steps": 3}
    loop, told = scripted(tmp_path, monkeypatch, [2, 3, 5, 6, 8, 9, 10, 11], train=limit, checkpoint={"save_every": 10})
    with pytest.raises(TrainingDivergedError, match=r"^3 steps in a row, up to step 10, .*max_skipped_steps=3"):
        loop.run()
    assert loop.step == 10 and loop.skipped == 7
    assert not events(told, "save")  # weights after a run of bad steps are not written over good ones
    assert told.events[-1] == ("end",)


def test_real_nans_end_a_real_run_with_the_weights_untouched(tmp_path: Path) -> None:
    config = parse([*TINY, "--output", str(tmp_path), "--train.max-skipped-steps", "3"])
    mesh = Mesh.single()
    parts = build(config, mesh, GPTTask(config))
    loader = BatchLoader(SyntheticDataset(61, 8), 4, 1, prefetch=0)
    loop = Loop(config, mesh, parts, loader, Output(tmp_path), Speedometer(1.0, 1, None))
    with torch.no_grad():
        next(iter(parts.stages[0].parameters())).view(-1)[0] = float("nan")
    before = [flat_shard.data.clone() for flat_shard in parts.optimizer.flat_shards()]
    with pytest.raises(TrainingDivergedError, match="3 steps in a row, up to step 3"):
        loop.run()
    after = [flat_shard.data for flat_shard in parts.optimizer.flat_shards()]
    assert all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(before, after))
    assert sum(int(torch.isnan(tensor).sum()) for tensor in after) == 1
    assert not Output(tmp_path).has_checkpoint


def test_who_asks_to_stop_gets_a_checkpoint_and_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, told = scripted(tmp_path, monkeypatch)

    class Asks(Callback):
        def on_step(self, step: int, result: StepResult, speed: Any) -> None:
            if step == 2:
                loop.ask_to_stop()

    loop.callbacks.append(Asks())
    assert not loop.run()
    assert events(told, "step", "save") == [("step", 1), ("step", 2), ("step", 3), ("save", 3)]
    assert events(told, "message")[0][1] == (
        f"asked to stop: saved step 3 in {tmp_path}/checkpoints/step-3; continue with --checkpoint.resume and the same "
        "output"
    )


def full_disk(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    real = loop_module.save

    def save(directory: Any, step: int, *rest: Any, **more: Any) -> Any:
        if step in steps:
            raise CheckpointError("no space")
        return real(directory, step, *rest, **more)

    monkeypatch.setattr(loop_module, "save", save)


def test_a_save_that_fails_on_the_way_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, told = scripted(tmp_path, monkeypatch, checkpoint={"save_every": 2})
    full_disk(monkeypatch, 2)
    assert loop.run()
    assert events(told, "save", "message") == [
        ("message", "checkpoint of step 2 NOT written, training goes on: no space"),
        ("save", 4),
        ("save", 6),
        ("message", f"saved step 6 in {tmp_path}/checkpoints/step-6"),
    ]


def test_the_last_save_must_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, told = scripted(tmp_path, monkeypatch)
    full_disk(monkeypatch, 6)
    with pytest.raises(CheckpointError, match="no space"):
        loop.run()
    assert told.events[-1] == ("end",)


def test_nobody_is_told_of_a_stop_that_was_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, told = scripted(tmp_path, monkeypatch)
    full_disk(monkeypatch, 1)
    loop.ask_to_stop()
    with pytest.raises(CheckpointError, match="no space"):
        loop.run()
    assert not events(told, "message")


def test_a_callback_that_cannot_write_is_left_out_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, told = scripted(tmp_path, monkeypatch)
    calls = []

    class Board(Callback):
        def on_step(self, step: int, result: StepResult, speed: Any) -> None:
            calls.append(step)
            if step == 2:
                raise OSError(28, "No space left on device")

    loop.callbacks.insert(0, Board())
    assert loop.run()
    assert calls == [1, 2]
    assert events(told, "message")[0] == (
        ("message", "Board ends, training goes on without it: [Errno 28] No space left on device")
    )
    assert len(events(told, "step")) == 6


def test_the_loop_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = scripted(tmp_path, monkeypatch)
    assert loop.where() == "step 1"
    loop.step = 4
    loop.runtime.executor.where = lambda: "0F1, forward"  # type: ignore[method-assign]
    assert loop.where() == "step 5, 0F1, forward"


# --- evaluation -------------------------------------------------------------------------------------------------


def direct_loss(config: RunConfig, output: Path) -> float:
    """Row by row, token by token: the mean of -log softmax over the valid documents' predictions, in float64."""
    mesh = Mesh.single()
    parts = build(config, mesh, GPTTask(config))
    loader = BatchLoader(SyntheticDataset(61, 8), 4, 1, prefetch=0)
    loop = Loop(config, mesh, parts, loader, Output(output), Speedometer(1.0, 1, None))
    loop.resume()
    model = parts.stages[0].eval()
    valid = open_sources(
        config.data.prefix,
        split=config.data.split,
        sequence_length=config.train.sequence_length,
        vocab_size=config.model.vocab_size,
        seed=config.seed,
    ).valid
    assert valid is not None and len(valid) % 4 != 0  # the last batch is not full
    total, tokens = 0.0, 0
    for row in range(len(valid)):
        batch = to_tensors(valid.rows([row]), np.array([row]))
        with torch.no_grad():
            logits = cast(Any, model).logits(batch)[0]
        for place in range(logits.shape[0]):
            if batch["loss_mask"][0, place]:
                z = logits[place]
                total += float(torch.log(torch.exp(z).sum()) - z[batch["labels"][0, place]])
                tokens += 1
    return total / tokens


def documents() -> Iterator[list[int]]:
    numbers = np.random.default_rng(5)
    yield from (numbers.integers(61, size=size).tolist() for size in itertools.islice(itertools.cycle([9, 30, 17]), 40))


def test_evaluation_is_the_direct_computation_on_every_mesh(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "text", "uint16") as writer:
        for document in documents():
            writer.add_document(document)
    own = [*TINY, "--data.no-synthetic", "--data.prefix", str(tmp_path / "text"), "--data.split", "2,1"]
    own += ["--precision.dtype", "fp64", "--optimizer.lr", "0.01", "--train.eval-every", "2"]
    own += ["--train.label-smoothing", "0.1", "--train.z-loss", "0.01", "--model.hidden-dropout", "0.1"]
    losses = []
    for name, ranks, mesh in (("one", 1, []), ("four", 4, ["--mesh.tp", "2", "--mesh.pp", "2"]), ("dp", 2, [])):
        output = tmp_path / name
        with started(tmp_path / f"{name}.log", [[*own, *mesh, "--output", str(output)]] * ranks) as job:
            assert job.wait() == [0] * ranks, job.everything()
        lines = [json.loads(line) for line in (output / "evaluation.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 4]
        losses.append([line["loss"] for line in lines])
    config = parse([*own, "--output", str(tmp_path / "one")])
    # Label smoothing, z-loss and dropout take no part in it.
    assert losses[0][1] == pytest.approx(direct_loss(config, tmp_path / "one"), abs=1e-9)
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-9)
    assert losses[0][0] != losses[0][1]
