"""`make bench-gpu` on a machine without a GPU: every part's code runs on tiny sizes, and one that fails is named."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "tools" / "benchmark"
SCRIPTS = ("gpu", "gpu_clock", "gpu_parts", "gpu_steps", "kernel_benchmark", "kernel_cases", "ours", "plain", "setting")


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The script, as it is when it runs by itself."""
    before = {name: sys.modules.pop(name, None) for name in SCRIPTS}
    with patch.object(sys, "path", [str(FOLDER), *sys.path]):
        yield importlib.import_module("gpu")
    for name in SCRIPTS:
        sys.modules.pop(name, None)
    sys.modules.update({name: module for name, module in before.items() if module is not None})


ROWS = {
    "machine": "copy of 32 MiB",
    "gpt2": "  on the GPU",
    "llama": "Llama, micro-batch 16",
    "plain": "Llama, micro-batch 16, ours over plain, 1",
    "kernels": "token_losses 128x500, 4 programs of 8 warps an SM",
    "products": "cpu Llama head, 8192 rows weight gradient, bf16",
    "attention": "Llama math views of [s, b, n, 3, d]",
    "flags": "Llama, rotary in plain torch",
    "compiled": "Llama, compiled blocks",
    "update": "Llama, 24 layers",
    "float8": "2 blocks, 4 x 32, blockwise over bf16",
    "dit": "adaLN, (4096, 2, 3072), reference",
}


def test_every_part_is_tested(gpu: Any) -> None:
    assert tuple(gpu.PARTS) == tuple(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_part_runs(name: str, gpu: Any, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with patch.object(sys.modules["kernel_cases"], "DEVICE", "cpu"):
        rows = gpu.work(name, tmp_path / "rows.jsonl", 600.0, tiny=True, wait=False)
    torch.set_num_threads(threads)
    failed = {row["name"]: row["note"] for row in rows if "note" in row}
    # What needs a GPU, and what the library has not got yet; nothing else may lack figures.
    allowed = {"clocks": "FileNotFoundError"} if name == "machine" else {}
    notes = {key: note for key, note in failed.items() if not note.startswith("there is no") and key not in allowed}
    assert not notes, notes
    assert ROWS[name] in [row["name"] for row in rows], [row["name"] for row in rows]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    assert all(row["name"] in gpu.table(rows) for row in rows)


def test_a_part_that_fails_costs_itself_alone(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes: one is killed, one ends by itself; and one for which no time is left is not begun."""
    finish = gpu.Worker.finish

    def late(worker: Any, seconds: float) -> Any:
        if worker.name == "products":
            worker._process.kill()
        return finish(worker, seconds)

    with patch.object(gpu.Worker, "finish", late):
        found = gpu.run(["products", "machine"], 600.0, True, tmp_path / "new" / "gpu.json")
    assert json.loads((tmp_path / "new" / "gpu.json").read_text()) == found
    assert {row["name"] for row in found["machine"]} > {"versions", "copy of 1024 MiB"}
    assert found["products"][-1]["name"] == "the part ended early"
    assert gpu.run(["machine"], 0.0, True, tmp_path / "gpu.json")["machine"][0]["name"] == "left out"
    assert "products, " in capsys.readouterr().out


def test_every_part_gets_its_time_in_nine_minutes(gpu: Any) -> None:
    """Also where each before it takes all that it is given, or where there is less."""
    for seconds in (540.0, 120.0):
        left, shares = seconds - gpu.GRACE, {}
        for number, name in enumerate(gpu.PARTS):
            shares[name] = gpu.given(name, list(gpu.PARTS)[number + 1 :], left)
            left -= shares[name]
        assert left >= 0.0
        if seconds == 540.0:
            assert all(shares[name] >= part.kept for name, part in gpu.PARTS.items()), shares
        assert shares["machine"] >= 15.0 and shares["gpt2"] >= 35.0
    assert gpu.given("update", [], 400.0) == 10.0


def test_a_part_that_is_stopped_takes_its_own_processes_along(gpu: Any, tmp_path: Path) -> None:
    """Which would go on using the GPU while the next part measures it."""
    script = tmp_path / "part.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, file=open(sys.argv[4] + '.pid', 'w'), flush=True)\n"
        "open(sys.argv[4], 'w').close()\n"
        "time.sleep(600)\n"
    )
    with patch.object(gpu, "__file__", str(script)), patch.object(gpu, "GRACE", 0.0):
        worker = gpu.Worker("machine", tmp_path, True)
        worker.wait_until_ready(60.0)
        rows = worker.finish(0.1)
    assert rows == [{"name": "the part ended early", "note": "stopped after 0 s"}]
    child = Path("/proc") / (tmp_path / "machine.jsonl.pid").read_text().strip() / "stat"
    for _ in range(100):
        if not child.exists() or ") Z " in child.read_text():  # where nobody waits for what lost its parent
            break
        time.sleep(0.05)
    else:
        raise AssertionError("a process that the part started still runs")


def test_a_row_that_fails_costs_itself_alone(gpu: Any) -> None:
    bench = sys.modules["gpu_clock"].Bench(True, "cpu", time.perf_counter() + 60.0)
    bench.each("wrong", lambda: 1 / 0)
    bench.each("right", lambda: {"ms": 1.0})
    bench.ends = 0.0
    bench.each("late", lambda: {"ms": 1.0})
    assert [row.get("note", row.get("ms")) for row in bench.rows] == [
        "ZeroDivisionError: division by zero",
        1.0,
        "no time left",
    ]


def test_the_classes_of_kernels(gpu: Any) -> None:
    """Names as the profiler gives them on an H200."""
    steps = sys.modules["gpu_steps"]
    names = {
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x256x64": "products",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention",
        "void pytorch_flash::flash_fwd_kernel<...>": "attention",
        "norm_backward_kernel": "norms",
        "partial_sums_kernel": "partial sums",
        "bias_gelu_sums_kernel": "activation",
        "pack_heads_kernel": "rotary",
        "add_rows_kernel": "embedding",
        "Memcpy DtoD (Device -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>": "elementwise",
        "void at::native::reduce_kernel<512, 1, ReduceOp<float>>": "reductions",
        "adamw_kernel": "update",
        "token_statistics_kernel": "loss",
    }
    for name, known in names.items():
        assert list(steps.by_class([(0.0, 2.0, name)])) == [known], name
    assert steps.busy_and_gaps([(0.0, 2.0, "a"), (1.0, 3.0, "b"), (1.5, 2.5, "c"), (5.0, 6.0, "d")]) == (4.0, 2.0)
