"""Micro-batches that are replayed: the numbers of passes that Python runs, bit for bit; without a GPU on a stand-in.

The stand-in for CUDA's graphs keeps the operators of a pass with the memory that they read and write, takes back what
they did, and does them again whenever it is asked to. So it sees no more of Python than a GPU does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from step_runs import Ran, configuration, steps
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_ds.config import validate
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Mesh
from megatron_ds.models.gpt import GPTTask
from megatron_ds.train import build as build_module
from megatron_ds.train.build import RankRuntime, build

LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied_embeddings": False}
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, Tensor] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in WAITS:
            raise RuntimeError(f"the host waits for {name} in a pass that is recorded")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
            for tensor in given:
                if storage_of(tensor) not in self.made:
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    self.before.setdefault(storage_of(tensor), (whole, whole.clone()))
        out = func(*args, **(kwargs or {}))
        known = {storage_of(t) for t in given}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in known:
                self.made[storage_of(tensor)] = tensor
        self.done.append(tree_map_only(Tensor, Tensor.detach, (func, args, kwargs or {}, out)))
        return out

    def take_back(self) -> None:
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))
        for whole, before in self.before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.done:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(out)):
                if isinstance(old, Tensor) and storage_of(new) != storage_of(old):
                    old.copy_(new)


class StandIn:
    """A recorder of graphs for a CPU."""

    def __init__(self, device: torch.device):
        self.device = device

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        yield

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        tape = Tape()
        with tape:
            loss = run()
        tape.take_back()
        return tape.replay, loss


def run(dtype: str, model: dict[str, Any], graphs: bool, **more: Any) -> tuple[Ran, int]:
    """Four steps of four micro-batches, and how often Python ran a forward pass."""
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    def before(parts: RankRuntime, mesh: Mesh, step: int, batches: Any) -> None:
        if step == 1:
            next(iter(parts.stages[0].layers.values())).register_forward_pre_hook(count)  # type: ignore[operator, union-attr]

    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    config = configuration(dtype, model={**dropout, **model}, train={"cuda_graphs": graphs}, **more)
    return steps(config, 4, before), passes


@pytest.mark.parametrize(
    ("dtype", "model", "more"),
    [("fp64", {}, {}), ("bf16", LLAMA, {"recompute": {"mode": "full"}}), ("fp16", {}, {"optimizer": {"name": "sgd"}})],
    ids=["gpt2", "llama", "fp16"],
)
def test_replayed_steps_are_the_steps(
    monkeypatch: pytest.MonkeyPatch, dtype: str, model: dict[str, Any], more: dict[str, Any]
) -> None:
    monkeypatch.setattr(build_module, "CudaRecorder", StandIn)
    (want, all_passes), (got, passes) = run(dtype, model, False, **more), run(dtype, model, True, **more)
    twice = 2 if "recompute" in more else 1
    # A step's first micro-batch and the others have a graph each: one pass for warming up, one that is recorded.
    assert (all_passes, passes) == (16 * twice, 4 * twice)
    assert list(map(str, got.results)) == list(map(str, want.results))
    for step, (mine, others) in enumerate(zip(got.parameters, want.parameters, strict=True)):
        for name, tensor in others.items():
            assert torch.equal(mine[name], tensor), f"{name} after step {step}"


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"mesh": {"dp": 2}}, 2, "world_size=2: ranks exchange gradients"),
    ({"device": "cpu"}, 1, "device='cpu': only a GPU"),
    ({"data": {"document_masking": True, "synthetic": False, "prefix": "a"}}, 1, "data.document_masking: each batch"),
    ({"data": {"conversations": True, "synthetic": False, "prefix": "a"}}, 1, "data.conversations: each batch"),
    ({"precision": {"dtype": "bf16", "fp8": "blockwise"}}, 1, "precision.fp8='blockwise': a step's first"),
    ({"zero": {"stage": 2}}, 1, "zero.stage=2: gradients have memory only"),
    ({"pipeline": {"chunks": 2}}, 1, "pipeline.chunks=2: one stage"),
    ({"compile": True}, 1, "compile: compiled code checks its inputs"),
    ({"log": {"record_steps": (2,)}}, 1, "log.record_steps: a graph's actions"),
]


@pytest.mark.parametrize(("changes", "world_size", "says"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_cannot_be_recorded_is_refused(changes: dict[str, Any], world_size: int, says: str) -> None:
    base = configuration("bf16").to_dict()
    for name, value in changes.items():
        base[name] = {**base[name], **value} if isinstance(value, dict) else value
    base["train"]["cuda_graphs"] = True
    config = type(configuration()).model_validate(base)
    with pytest.raises(ConfigError) as refused:
        validate(config, world_size)
    (line,) = (text for text in str(refused.value).splitlines() if "cuda_graphs" in text)
    assert f"train.cuda_graphs with {says}" in line and line.endswith("change that, or use --train.no-cuda-graphs")


def test_a_device_that_turns_out_to_be_none_with_graphs_is_refused() -> None:
    config = configuration(train={"cuda_graphs": True})
    validate(config, 1)
    with pytest.raises(ConfigError, match=r"on cpu: only a GPU has graphs; use --train\.no-cuda-graphs"):
        build(config, Mesh.single(), GPTTask(config))
