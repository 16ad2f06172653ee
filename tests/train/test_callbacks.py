"""What is recorded around the steps: TensorBoard, metrics, speed; and what a full disk does to them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_disk import largest_file
from started_ranks import TINY, pretrain_gpt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ds.host import peak_memory_bytes
from megatron_ds.mesh import Mesh
from megatron_ds.testing import run_ranks
from megatron_ds.train.callbacks import LossLines, MetricsFile, ProgressBar, TensorBoard
from megatron_ds.train.launch import run_main
from megatron_ds.train.metrics import Speedometer, peak_tflops
from megatron_ds.train.report import read_losses
from megatron_ds.train.step import StepResult, TrainStep

NAMES = {
    *("train/loss", "train/learning_rate", "train/gradient_norm", "train/loss_scale", "train/skipped_steps"),
    *("speed/seconds", "speed/tokens_per_s", "speed/targets_per_s", "speed/tflops_per_rank", "speed/mfu"),
    *("speed/data_wait", "memory/peak_gb", "valid/loss"),
}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar that TensorBoard would show."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def result(loss: float = 1.0, skipped: bool = False) -> StepResult:
    return StepResult(loss, 2.0, 1e-3, 64, 1.0, skipped, False)


def speed(rate: float) -> dict[str, float]:
    """Of a step of one second."""
    return {"seconds": 1.0, "tokens_per_s": rate, "targets_per_s": rate}


def test_tensorboard_holds_every_named_value_of_a_run_and_of_its_continuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [a for a in TINY if a != "--log.no-tensorboard"] + ["--log.peak-tflops", "0.5", "--train.eval-every", "2"]
    from megatron_ds.data.indexed_writer import IndexedDatasetWriter

    with IndexedDatasetWriter(tmp_path / "text", "uint16") as writer:
        for document in range(40):
            writer.add_document([(document * 7 + i) % 61 for i in range(30)])
    common += ["--data.no-synthetic", "--data.prefix", str(tmp_path / "text"), "--data.split", "3,1"]
    for more in (["--train.steps", "4"], ["--train.steps", "6", "--checkpoint.resume"]):
        output = ["--output", str(tmp_path / "run")]
        monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *common, *more, *output])
        assert run_main(pretrain_gpt().main) == 0
    shown = scalars(tmp_path / "run" / "tensorboard")
    assert shown.keys() == NAMES
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for tag, key in (("train/loss", "loss"), ("train/gradient_norm", "grad_norm"), ("speed/mfu", "mfu")):
        assert [step for step, _ in shown[tag]] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in shown[tag]] == pytest.approx([line[key] for line in lines], rel=1e-6)
    assert [step for step, _ in shown["valid/loss"]] == [2, 4, 6]
    for line in lines:
        assert line["targets"] == 4 * 8
        assert line["mfu"] == pytest.approx(line["tflops_per_rank"] / 0.5)
        assert 0 <= line["data_wait"] < 1
    assert 0.05 < shown["memory/peak_gb"][0][1] < 64
    # The learning rate goes on where it was: cosine over 4 steps, then over 6.
    assert all(line["learning_rate"] < 3e-4 for line in lines)


def test_skipped_steps_are_counted_over_resumes_and_between_the_points(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, Mesh.single(), every=2)
    board.on_start(10, 16, skipped=3)
    for step, skipped in ((11, True), (12, True), (13, False), (14, True)):
        board.on_step(step, result(skipped=skipped), speed(1.0))
    board.on_end()
    assert scalars(tmp_path)["train/skipped_steps"] == [(12, 5.0), (14, 6.0)]


def test_a_point_of_several_steps_has_the_speed_of_all_of_them(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, Mesh.single(), every=3)
    board.on_start(0, 6, skipped=0)
    for step, seconds in enumerate((8.0, 1.0, 1.0, 2.0, 2.0, 2.0), start=1):  # 600 tokens each
        board.on_step(step, result(), {**speed(600 / seconds), "seconds": seconds, "data_wait": 1 / seconds})
    board.on_end()
    shown = scalars(tmp_path)
    assert shown["speed/tokens_per_s"] == [(3, pytest.approx(1800 / 10)), (6, pytest.approx(300))]
    assert shown["speed/data_wait"] == [(3, pytest.approx(3 / 10)), (6, pytest.approx(1 / 2))]
    assert shown["speed/seconds"] == [(3, 10.0), (6, 6.0)]


def test_without_a_progress_bar_a_line_every_few_steps_says_how_it_goes(capfd: pytest.CaptureFixture[str]) -> None:
    lines = LossLines(every=2)
    lines.on_start(0, 5, 0)
    for step in range(1, 6):
        lines.on_step(step, result(step / 4, skipped=step == 4), {**speed(1000.0 * step), "targets_per_s": 150.0})
    assert capfd.readouterr().err.splitlines() == [
        "step 2 of 5: loss 0.5000, 1,500 tok/s (150 targets/s), learning rate 0.001, gradient norm 2, 0:00:03 left",
        "step 4 of 5: loss 1.0000, 3,500 tok/s (150 targets/s), SKIPPED, learning rate 0.001, gradient norm 2, "
        "0:00:01 left",
        "step 5 of 5: loss 1.2500, 5,000 tok/s (150 targets/s), learning rate 0.001, gradient norm 2, 0:00:00 left",
    ]


def test_a_log_file_gets_the_first_line_the_last_and_some_between(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a resumed run, with a step a second: the time left is from the steps of this run."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    lines = LossLines(every=1, seconds=10.0)
    lines.on_start(100, 125, 0)
    for step in range(101, 126):
        clock[0] += 1.0
        lines.on_step(step, result(), speed(1000.0))
    shown = capfd.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in shown] == [f"step {n} of 125" for n in (101, 111, 121, 125)]
    assert [line.rpartition(", ")[2] for line in shown] == [f"0:00:{n:02} left" for n in (24, 14, 4, 0)]


def test_what_is_not_finite_is_null_in_the_metrics_and_nan_when_read(tmp_path: Path) -> None:
    said: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", said.append)
    file.on_start(0, 3, 0)
    file.on_step(1, result(), {})
    file.on_step(2, replace(result(math.nan, skipped=True), grad_norm=math.inf), {})
    file.on_evaluation(2, math.nan)

    def no_json(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    second = json.loads(lines[1], parse_constant=no_json)
    assert second["loss"] is None and second["grad_norm"] is None and second["learning_rate"] == 1e-3
    assert json.loads((tmp_path / "evaluation.jsonl").read_text(), parse_constant=no_json)["loss"] is None
    losses = read_losses(tmp_path)
    assert losses[0] == 1.0 and math.isnan(losses[1])


def test_a_full_disk_never_leaves_half_a_line_and_loses_none(tmp_path: Path) -> None:
    said: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", said.append)
    file.on_start(0, 10, 0)
    file.on_step(1, result(), {})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with largest_file(size + size // 2):
        for step in (2, 3):
            file.on_step(step, result(), {})
            assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
            assert (tmp_path / "metrics.jsonl").stat().st_size == size
    file.on_step(4, result(), {})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert said == [f"{tmp_path}/metrics.jsonl cannot be written, its lines wait in memory: {said[0].split(': ')[1]}"]


def test_lines_that_could_not_be_written_to_the_end_are_said_to_be_lost(tmp_path: Path) -> None:
    said: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", said.append)
    file.on_start(0, 10, 0)
    with largest_file(8):
        file.on_step(1, result(), {})
        file.on_step(2, result(), {})
        file.on_end()
    assert len(said) == 2 and said[1].startswith(f"2 lines of {tmp_path}/metrics.jsonl are lost")


def test_an_output_directory_that_is_deleted_during_the_run_is_said_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, real = tmp_path / "run", TrainStep.__call__

    def step(self: TrainStep, *arguments: Any) -> StepResult:
        if self.optimizer.count == 2:
            shutil.rmtree(run)
        return real(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *TINY, "--output", str(run)])
    assert run_main(pretrain_gpt().main) == 0
    assert capfd.readouterr().err.count(f"{run}/metrics.jsonl was deleted during the run") == 1
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [3, 4]
    assert (run / "checkpoints" / "step-00000004").exists()


def test_a_directory_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        MetricsFile(tmp_path / "absent" / "metrics.jsonl", print).on_start(0, 10, 0)


def test_the_progress_bar_shows_loss_speed_and_skipped_steps(capfd: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.on_start(2, 4, 0)
    bar.on_step(3, result(1.25), speed(12345.6))
    bar.on_evaluation(3, 0.5)
    bar.on_step(4, result(skipped=True), speed(1.0))
    bar.on_end()
    shown = capfd.readouterr().err
    assert "2/4" in shown and "4/4" in shown and "SKIPPED" in shown
    assert "step 3: validation loss 0.5000" in shown


def test_speed_is_tokens_over_time_and_flops_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    meter = Speedometer(flops_per_token=6e6, ranks=4, peak=0.5)
    meter.add(1000, 100)
    meter.add(1000, 200)
    clock[0] += 0.003
    with meter.waiting_for_data():
        clock[0] += 0.001
    assert meter.read() == pytest.approx(
        {
            "seconds": 0.004,
            "tokens_per_s": 5e5,
            "targets_per_s": 7.5e4,
            "tflops_per_rank": 0.75,
            "mfu": 1.5,
            "data_wait": 0.25,
        }
    )
    meter.add(100, 100)
    with meter.waiting_for_data():
        clock[0] += 1.0
    clock[0] += 50.0  # an evaluation, say
    meter.restart()
    meter.add(300, 30)
    clock[0] += 3.0
    read = meter.read()
    assert read["tokens_per_s"] == pytest.approx(100.0) and read["data_wait"] == 0.0
    assert "mfu" not in Speedometer(1.0, 1, None).read()


def resident_and_peaks() -> tuple[int, int, int]:
    """In a fresh process, which has no freed memory at hand: bytes resident, the peak then, and after 300 MB more."""
    before = peak_memory_bytes(torch.device("cpu"))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    torch.ones(300 << 18)
    return pages * os.sysconf("SC_PAGE_SIZE"), before, peak_memory_bytes(torch.device("cpu"))


def test_the_peak_is_of_this_process_and_not_of_what_started_it() -> None:
    """`ru_maxrss` is the larger of both: an exec keeps it."""
    code = "import torch; from megatron_ds.host import peak_memory_bytes as p; print(p(torch.device('cpu')))"
    launcher = f"import os, sys; x = b'1' * (900 << 20); os.execv(sys.executable, [sys.executable, '-c', {code!r}])"
    done = subprocess.run([sys.executable, "-c", launcher], capture_output=True, text=True, check=True)
    assert 50 << 20 < int(done.stdout) < 800 << 20


def test_memory_and_peak_of_a_cpu() -> None:
    assert peak_tflops(torch.device("cpu")) is None
    ((resident, before, after),) = run_ranks(resident_and_peaks, 1)
    assert before >= 0.9 * resident
    assert after >= resident + 0.9 * (300 << 20)
