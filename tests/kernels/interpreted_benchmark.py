"""The benchmark of kernels, run whole on sizes fit for the interpreter: nothing of it may fail first on a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from float8_interpreted import right_casts

from megatron_ds.kernels.activation import gated

FOLDER = Path(__file__).parents[2] / "tools" / "benchmark"


def load() -> tuple[Any, Any]:
    """``kernel_benchmark`` and ``kernel_cases``."""
    modules = []
    for name in ("kernel_cases", "kernel_benchmark"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up, and one finds the other
        spec.loader.exec_module(module)
        modules.append(module)
    return modules[1], modules[0]


def small(module: Any) -> dict[str, Any]:
    """The first case of each op. Attention in fp16: the interpreter's products of bf16 are wrong."""
    first = {case.op: case for case in reversed(module.streaming_cases(torch.bfloat16, scale=512))}
    # Norms of the few columns that this leaves would be all cancellation.
    wider = {case.op: case for case in reversed(module.streaming_cases(torch.bfloat16, scale=64))}
    first |= {op: case for op, case in wider.items() if "norm" in op or op == "seam"}
    shorter = {case.op: case for case in reversed(module.streaming_cases(torch.bfloat16, scale=2048))}
    first |= {op: case for op, case in shorter.items() if "rotary" in op or op == "heads"}
    first |= {case.op: case for case in reversed(module.loss_cases(torch.bfloat16, scale=512))}
    first |= {case.op: case for case in reversed(module.update_cases(torch.bfloat16, scale=512))}
    narrow = [case for case in module.attention_cases(torch.float16, scale=512) if "d=64" in case.op]
    first |= {case.op: case for case in reversed(narrow)}
    return first


def benchmark_checks() -> None:
    """It passes every kernel and refuses to measure one that is wrong."""
    kernels, module = load()
    with right_casts(), patch.object(module, "DEVICE", "cpu"):
        first = small(module)
        assert len(first) == 24, list(first)
        faults = {op: kernels.check(case) for op, case in first.items()}
        assert not any(faults.values()), faults
        wrong = replace(first["swiglu"], run=lambda x: gated(x, "silu" if x.dtype == torch.float64 else "gelu"))
        assert "is off by" in kernels.check(wrong)


def benchmark_measures() -> None:
    """From the cases to the table, the JSON and the plot; a peer that fails and a kernel that is wrong are named."""
    kernels, module = load()
    clock = iter([2.0, 4.0] * 1000)  # ours first: forward 2 ms, backward 4 ms

    def milliseconds(function: Any, repeats: int) -> float:
        function()
        return next(clock)

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend="eager", dynamic=False)

    def refuse() -> Any:
        raise MemoryError("too large\nby far")

    with (
        patch.object(module, "DEVICE", "cpu"),
        patch.object(kernels, "milliseconds", milliseconds),
        patch.object(module, "compiled", compiled),
        patch.object(kernels, "compiled", compiled),
        tempfile.TemporaryDirectory() as folder,
    ):
        first = small(module)
        names = ("rms_norm", "cross_entropy", "linear_cross_entropy", "attention dense d=64", "attention bigbird d=64")
        chosen = [first[name] for name in names]
        chosen[0] = replace(chosen[0], peers={"broken": refuse})
        chosen.append(replace(first["swiglu"], run=lambda x: gated(x, "silu" if x.dtype == torch.float64 else "gelu")))
        # Such that the RMSNorm reaches its target of 90% forward, and backward, which takes twice as long, is short.
        copy = chosen[0].forward / 2.0 / 1e6 / 0.95
        machine = {"gpu": "none", "torch": "t", "triton": "t", "copy GB/s": copy, "bf16 matmul TFLOP/s": 1.0}
        files = Path(folder) / "new" / "kernels.json", Path(folder) / "new" / "kernels.png"
        assert kernels.run(chosen, machine, *files) == 1, "a wrong kernel is no success"
        result = json.loads(files[0].read_text())
        assert files[1].stat().st_size > 10_000
    assert list(result["wrong"]) == [f"swiglu {first['swiglu'].shape}"]
    rows = {(r["op"], r["direction"], r["implementation"]): r for r in result["rows"]}
    forward, backward = (rows["rms_norm", direction, "ours"] for direction in ("forward", "backward"))
    assert abs(forward["share"] - 0.95) < 1e-9 and forward["target"] == 0.90
    assert kernels.verdict(kernels.Row(**forward)) == "reaches 90%"
    assert kernels.verdict(kernels.Row(**backward)) == "SHORT OF 80%", backward
    assert rows["rms_norm", "forward", "broken"]["note"] == "MemoryError: too large"
    for name in ("eager", "compile"):
        assert rows["rms_norm", "backward", name]["rate"] > 0
    for op in ("cross_entropy", "linear_cross_entropy"):
        for name in ("ours", "torch", "compile"):
            assert rows[op, "forward and backward", name]["rate"] > 0, (op, name)
    dense, sparse = (rows[f"attention {name} d=64", "forward", "ours"] for name in ("dense", "bigbird"))
    assert dense["unit"] == "TFLOP/s" and sparse["target"] == 0.75 * dense["rate"]
    assert rows["attention dense d=64", "backward", "sdpa"]["rate"] > 0
    # FlexAttention has no backward pass on a CPU: its forward pass has failed, with gradients wanted, or ran.
    flex = rows["attention dense d=64", "forward", "flex"]
    assert flex["note"] or flex["rate"] > 0
