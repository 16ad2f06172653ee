"""Memory as it is measured: tensors that are alive after a step against the paper's formulas, and the kernel's own
figures of the peak, with more ranks and with state on a disk."""

from __future__ import annotations

import ctypes
import gc
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_ds import comm
from megatron_ds.comm.buffers import GroupGathered
from megatron_ds.config import OptimizerConfig, ZeroConfig
from megatron_ds.kernels.square_sum import square_sum
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.shard import ShardSpec
from megatron_ds.testing import run_ranks
from megatron_ds.zero.memory import TransientGradients, TransientParameters
from megatron_ds.zero.optimizer import ZeroOptimizer

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int, matrices: int, dtype: torch.dtype):
        super().__init__()
        # One element stands for all: a parameter of the right shape that takes no memory.
        one = torch.zeros(1, dtype=dtype)
        self.weights = nn.ParameterList(nn.Parameter(one.expand(width, width)) for _ in range(matrices))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            inputs = inputs + torch.tanh(inputs @ weight)
        return inputs


class Stack(nn.Module):
    """Maps ``[n, width]`` to itself; a weight's values come from the numbers in its name alone."""

    def __init__(self, blocks: int, width: int, dtype: torch.dtype, matrices: int = 1):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, matrices, dtype) for _ in range(blocks))
        for name, parameter in self.named_parameters():
            parameter.shard = ShardSpec(name, tuple(parameter.shape))  # type: ignore[attr-defined]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return inputs

    @staticmethod
    def fill(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            block, matrix = map(int, re.findall(r"\d+", parameter.shard.name))  # type: ignore[attr-defined]
            generator = torch.Generator().manual_seed(100 * matrix + block)
            torch.nn.init.normal_(parameter, std=parameter.shape[0] ** -0.5, generator=generator)


def start(model: Stack, config: ZeroConfig) -> tuple[ZeroOptimizer, Mesh]:
    mesh = Mesh.create(MeshShape(dp=dist.get_world_size()), CPU)
    zero = ZeroOptimizer(
        model.named_parameters(),
        mesh,
        config,
        OptimizerConfig(lr=1e-3),
        shared_memory=False,  # a page that several ranks share counts for each of them
        root=model,
        fill=Stack.fill,
    )
    return zero, mesh


def train(model: Stack, zero: ZeroOptimizer, mesh: Mesh, steps: int) -> float:
    width, dtype = next(model.parameters()).shape[0], next(model.parameters()).dtype
    for step in range(steps):
        inputs = torch.randn(4, width, generator=torch.Generator().manual_seed(step)).to(dtype)
        zero.start_step()
        for rows, last in zip(inputs.split(2), (False, True)):
            loss = model(rows).float().square().mean() / dist.get_world_size()
            zero.start_backward(last)
            loss.backward()
            zero.end_backward()
        zero.finish_gradients()
        # A sum for each parameter, and of these one that is rounded once: the same bits whatever the buckets are.
        squares = math.fsum(square_sum(shard.data).item() for shard in zero.gradient_shards())
        norm = comm.all_reduce(torch.tensor(squares, dtype=torch.float64), mesh.world).sqrt()
        zero.step(1e-3)
    return float(norm)


# --- what is alive between steps ----------------------------------------------------------------------------------

BLOCKS, WIDTH = 6, 192


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by address: views of one storage count once."""
    with torch._C.DisableTorchFunctionSubclass():
        found = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
        return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def everything() -> list[torch.Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]


def by_kind(zero: ZeroOptimizer) -> dict[str, int]:
    tensors: dict[str, list[torch.Tensor]] = {"parameters": [], "gradients": [], "state": []}
    for bucket in zero.buckets:
        transient = isinstance(bucket.parameters, TransientParameters)
        tensors["parameters"].append(bucket.parameters.whole)
        if transient or bucket.state.holding is None:
            tensors["parameters"].append(bucket.parameters.shard)
        assert bucket.gradients is not None
        tensors["gradients"].append(bucket.gradients.shard)
        tensors["state"] += bucket.state.acquire().values()
        bucket.state.release(changed=False)
    return {kind: sum(storages(of_kind).values()) for kind, of_kind in tensors.items()}


def held_bytes() -> list[dict[str, int]]:
    """On a rank, for stages 0 to 3: by kind, ``all`` tensors that were not there before, and what is reported."""
    found = []
    for stage in range(4):
        alive = everything()  # and kept so: a new tensor where one of them was would be taken for it
        before = storages(alive)
        model = Stack(BLOCKS, WIDTH, torch.bfloat16)
        settings = {"persistence_threshold": 0} if stage == 3 else {}
        zero, mesh = start(model, ZeroConfig(stage=stage, bucket_mb=0.07, **settings))  # type: ignore[arg-type]
        train(model, zero, mesh, steps=2)
        report = zero.bytes_report()
        after = storages(everything())
        new = sum(size for address, size in after.items() if before.get(address) != size)
        found.append({**by_kind(zero), "all": new, "reported": sum(report.values())})
        zero.close()
        del model, zero
    return found


@pytest.mark.parametrize("ranks", [1, 4])
def test_each_stage_holds_what_the_paper_says(ranks: int) -> None:
    """Rajbhandari et al. 2020, section 5, with K = 12 and gradients that are summed in fp32."""
    elements = BLOCKS * WIDTH * WIDTH
    for of_rank in run_ranks(held_bytes, ranks):
        for stage, found in enumerate(of_rank):
            expected = {
                "parameters": 2 * elements / (ranks if stage >= 3 else 1),
                "gradients": 4 * elements / (ranks if stage >= 2 else 1),
                "state": 12 * elements / (ranks if stage >= 1 else 1),
            }
            for kind, size in expected.items():
                assert found[kind] == pytest.approx(size, rel=0.05), f"stage {stage}: {kind}"
            assert found["all"] == pytest.approx(sum(expected.values()), rel=0.05), f"stage {stage}: something else"
            assert found["reported"] == pytest.approx(sum(expected.values()), rel=0.05), f"stage {stage}: the report"


# --- the peak -----------------------------------------------------------------------------------------------------

MB = 1_000_000
UNIT = 640 * 640 * 4 / MB
"""MB of a block's weights, and of its gradients."""


def peak_of(
    settings: dict[str, Any], blocks: int, trained: int | None = None, matrices: int = 1
) -> tuple[float, float, dict[str, dict[str, int]]]:
    """MB that building a model and training it for two steps adds to this process at most; the last norm; bytes.

    ``trained``: only so many of the last blocks are, the others are frozen. Default: all. ``matrices``: of a block.
    """
    # Memory goes back to the system as soon as it is freed, whatever its size: what is resident is what is held.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    for width in (32, 640):  # the first brings in what torch and gloo need once
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        model = Stack(blocks, width, torch.float32, matrices)
        for block in list(model.blocks)[: 0 if trained is None else -trained]:
            block.requires_grad_(False)
        config = ZeroConfig(**{"stage": 3, "bucket_mb": 2.0, "persistence_threshold": 0, **settings})
        zero, mesh = start(model, config)
        norm = train(model, zero, mesh, steps=2)
        peak = resident("VmHWM") - before
        report = zero.bytes_by_store()
        zero.close()
        del model, zero
    return peak, norm, report


def resident(line: str) -> float:
    return int(re.findall(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024 / MB


def test_the_peak_of_stage_3_falls_with_ranks_down_to_a_few_units() -> None:
    """Beyond its share a rank holds what is on its way: about eight units of weights and gradients, of 12 or of 24."""
    norms = {}
    for ranks, blocks in ((1, 24), (2, 24), (4, 12)):
        share = 4 * blocks * UNIT / ranks  # weights, gradients and two kinds of state
        for peak, norm, _ in run_ranks(peak_of, ranks, {}, blocks):
            assert share < peak < share + (10 if ranks > 1 else 2) * UNIT, f"{ranks} ranks, {blocks} blocks"
            norms[ranks, blocks] = norm
    assert norms[2, 24] == pytest.approx(norms[1, 24], rel=1e-4)


@pytest.mark.parametrize("prefetch", [0, 1])
def test_the_peak_of_stage_3_falls_with_ranks_down_to_one_gathered_unit(prefetch: int) -> None:
    """Where a block is several buckets, as a large model's is: beyond its share a rank holds the block in use, the one
    that is fetched ahead, and less than one more of gradients on their way and of what is not counted here."""
    # Of gradients five buckets, which is 0.4 units here; a process's own 2 to 4 MB differ from run to run.
    blocks, matrices, peaks = 4, 12, []
    unit = matrices * UNIT
    for ranks in (2, 4):
        share = 4 * blocks * unit / ranks
        settings = {"bucket_mb": UNIT, "prefetch": prefetch}
        peaks.append(max(peak for peak, _, _ in run_ranks(peak_of, ranks, settings, blocks, None, matrices)))
        assert 1 + prefetch < (peaks[-1] - share) / unit < 2 + prefetch, f"{ranks} ranks"
    assert peaks == sorted(peaks, reverse=True)


def most_whole(settings: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """On a rank: the most bytes of whole gradients and parameters at one time in two steps; what the layout says."""
    now, most, patch = {"gradients": 0, "parameters": 0}, {"gradients": 0, "parameters": 0}, pytest.MonkeyPatch()

    def add(kind: str, size: int) -> None:
        now[kind] += size
        most[kind] = max(most[kind], now[kind])

    def watch(kind: str, cls: type, method: str, size_of: Any) -> None:
        original = getattr(cls, method)

        def watched(self: Any, *given: Any) -> Any:
            before = size_of(self)
            result = original(self, *given)
            add(kind, size_of(self) - before)
            return result

        patch.setattr(cls, method, watched)

    for method in ("take", "free"):
        watch("gradients", TransientGradients, method, lambda owner: 0 if owner.whole is None else owner.whole.nbytes)
    for method in ("take", "discard"):
        watch("parameters", GroupGathered, method, lambda owner: owner.whole.untyped_storage().nbytes())
    model = Stack(6, 64, torch.float32, 2)
    zero, mesh = start(model, ZeroConfig(bucket_mb=64 * 64 * 4 / 1e6, persistence_threshold=0, **settings))
    for sizes in (now, most):
        sizes.update(gradients=0, parameters=0)
    train(model, zero, mesh, steps=3)
    patch.undo()  # close() gathers everything
    zero.close()
    return most, zero.layout.transient_bytes(micro_batches=2)


@pytest.mark.parametrize(
    "settings", [{"stage": 3}, {"stage": 3, "prefetch": 0}, {"stage": 3, "keep_whole": True}], ids=str
)
def test_what_is_whole_for_a_moment_is_within_what_the_layout_says(settings: dict[str, Any]) -> None:
    """A block is two buckets here. Gathered units to the byte; of gradients at least half of the bound is used."""
    for found, said in run_ranks(most_whole, 2, settings):
        assert found["parameters"] == said["parameters"] > 0
        if settings.get("keep_whole"):
            assert said["gradients"] == 0, "they stay, and are counted as held"
        else:
            assert said["gradients"] / 2 <= found["gradients"] <= said["gradients"]


@pytest.mark.parametrize(("ranks", "bound"), [(1, 6), (2, 12)])
def test_nvme_offload_keeps_host_memory_under_the_bound(tmp_path: Path, ranks: int, bound: int) -> None:
    """118 MB of weights and optimizer state through 6 or 12 MB; gradients stay, and the unit in use with its
    activations (two, and what is gathered ahead, where ranks exchange them)."""
    blocks = 24
    nvme = {"device": "nvme", "path": str(tmp_path)}
    settings = {"offload_optimizer": nvme, "offload_parameters": nvme, "host_memory_mb": bound}
    gradients = blocks * UNIT / ranks
    for peak, norm, report in run_ranks(peak_of, ranks, settings, blocks):
        on_disk = sum(places["disk"] for places in report.values()) / MB
        assert on_disk == pytest.approx(3 * blocks * UNIT / ranks) and on_disk > 4 * bound
        assert report["gradients"] == {"device": round(gradients * MB), "host": 0, "disk": 0}
        assert all(places["host"] == 0 for places in report.values())
        assert gradients < peak < gradients + bound + (3 if ranks == 1 else 8) * UNIT
        if ranks == 1:
            assert norm == run_ranks(peak_of, 1, {}, blocks)[0][1], "the same numbers, bit for bit"


def test_a_model_that_is_mostly_frozen_needs_no_more_than_the_bound(tmp_path: Path) -> None:
    """Nothing is subtracted here: 79 MB of weights, of which one block of 48 trains, in a bound of 12 MB and the units
    in use."""
    nvme = {"device": "nvme", "path": str(tmp_path)}
    settings = {"offload_optimizer": nvme, "offload_parameters": nvme, "host_memory_mb": 12}
    peak, norm, report = run_ranks(peak_of, 1, settings, 48, 1)[0]
    weights = report["parameters"]["disk"] / MB
    assert weights == pytest.approx(48 * UNIT) and weights > 6 * 12
    assert peak < 12 + 4 * UNIT
    assert norm == pytest.approx(run_ranks(peak_of, 2, {}, 48, 1)[0][1], rel=1e-4), "as sharded in memory"
