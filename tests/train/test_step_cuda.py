"""Training on one GPU: Triton kernels against reference kernels, and a run that is stopped, moved and resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import step_runs
import torch
from step_runs import Ran, configuration, steps

from megatron_ds.kernels import registry
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.train.report import read_losses

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied_embeddings": False}
GPT2: dict[str, Any] = {}


def run(kernels: str, dtype: str, model: dict[str, Any], recompute: str = "none") -> Ran:
    config = configuration(dtype, model={**model, "hidden_dropout": 0.1}, recompute={"mode": recompute})
    with registry.use(kernels):  # type: ignore[arg-type]
        return steps(config, 4)


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def mesh(shape: MeshShape) -> Mesh:
        return Mesh.create(shape, torch.device("cuda"))

    monkeypatch.setattr(step_runs, "_mesh", mesh)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2), ("fp16", 2e-3)])
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_triton_trains_as_the_reference_does(model: dict[str, Any], dtype: str, tolerance: float) -> None:
    got, want = run("triton", dtype, model), run("reference", dtype, model)
    for mine, reference in zip(got.results, want.results, strict=True):
        assert mine.loss == pytest.approx(reference.loss, rel=tolerance)
        assert mine.grad_norm == pytest.approx(reference.grad_norm, rel=5 * tolerance)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_bits_every_time_and_with_recomputation(dtype: str) -> None:
    first = run("triton", dtype, LLAMA)
    for again in (run("triton", dtype, LLAMA), run("triton", dtype, LLAMA, recompute="full")):
        assert [r.loss for r in again.results] == [r.loss for r in first.results]
        for name, tensor in first.parameters[-1].items():
            assert torch.equal(again.parameters[-1][name], tensor), name


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_graphs_are_the_passes_that_they_record(model: dict[str, Any]) -> None:
    """Four micro-batches a step: the first and the others have a graph each, replayed from the second step on."""
    sections = {"model": {**model, "hidden_dropout": 0.1}, "train": {"cuda_graphs": True}}
    got, want = steps(configuration("bf16", **sections), 5), steps(configuration("bf16", model=sections["model"]), 5)
    assert list(map(str, got.results)) == list(map(str, want.results))
    for name, tensor in want.parameters[-1].items():
        assert torch.equal(got.parameters[-1][name], tensor), name


def pretrain(output: Path, device: str, *arguments: str, dtype: str = "fp64") -> list[float]:
    command = [sys.executable, str(ROOT / "examples" / "pretrain_gpt.py"), "--data.synthetic", "--device", device]
    command += ["--model.num-layers", "2", "--model.hidden-size", "64", "--model.num-heads", "4"]
    command += ["--model.vocab-size", "256", "--train.global-batch", "4", "--train.micro-batch", "2"]
    command += ["--train.sequence-length", "64", "--precision.dtype", dtype, "--optimizer.schedule", "constant"]
    command += ["--output", str(output), "--checkpoint.save-every", "3", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_losses(output)


def test_a_run_goes_from_gpu_to_cpu_and_back(tmp_path: Path) -> None:
    whole = pretrain(tmp_path / "whole", "cuda", "--train.steps", "9")
    assert len(whole) == 9
    moved = tmp_path / "moved"
    for steps_done, device in ((3, "cuda"), (6, "cpu"), (9, "cuda")):
        losses = pretrain(moved, device, "--train.steps", str(steps_done), "--checkpoint.resume")
        assert len(losses) == steps_done
    assert losses == pytest.approx(whole, rel=1e-9)


def test_a_run_in_bf16_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    # Without clipping: the norm's last bits depend on where a bucket ends.
    plain = ["--optimizer.clip-norm", "0"]
    offload = ["--zero.stage", "3", "--zero.persistence-threshold", "100"]
    for part in ("optimizer", "parameters"):
        offload += [f"--zero.offload-{part}.device", "nvme", f"--zero.offload-{part}.path", str(tmp_path / "swap")]
    whole = pretrain(tmp_path / "whole", "cuda", "--train.steps", "6", *plain, dtype="bf16")
    for steps_done, settings in ((3, []), (6, offload)):
        arguments = ["--train.steps", str(steps_done), "--checkpoint.resume", *plain, *settings]
        losses = pretrain(tmp_path / "moved", "cuda", *arguments, dtype="bf16")
    assert len(whole) == 6 and losses == whole
