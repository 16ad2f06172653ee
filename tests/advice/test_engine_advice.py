"""What an engine says of its user's settings: when it should, once, on rank 0, with numbers that are measured here."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import megatron_ds
from megatron_ds.advice import rules, run_advice
from megatron_ds.advice.activation_meter import ActivationMeter
from megatron_ds.advice.rules import Link
from megatron_ds.testing import run_ranks


class Block(nn.Module):
    def __init__(self, width: int, reentrant: bool | None):
        super().__init__()
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.reentrant, self.gradient_checkpointing = reentrant, reentrant is not None

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.second(torch.tanh(self.first(hidden)).square())


class Net(nn.Module):
    """Blocks that are computed again if ``reentrant`` says how."""

    def __init__(self, width: int = 16, reentrant: bool | None = None, sleep: float = 0.0):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block(width, reentrant) for _ in range(4))
        self.output = nn.Linear(width, 1)
        self.sleep = sleep

    def forward(self, samples: Tensor) -> Tensor:
        time.sleep(self.sleep)
        hidden = self.output.weight.new_zeros(1).requires_grad_() + samples
        for block in self.blocks:
            assert isinstance(block, Block)
            if block.reentrant is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=block.reentrant)  # type: ignore[assignment]
        return self.output(hidden).float().square().mean()


def trained(said: list[str], net: nn.Module, samples: Tensor, config: dict[str, Any], steps: int = 4) -> list[str]:
    engine = megatron_ds.initialize(net, config)
    assert samples.dtype == next(net.parameters()).dtype
    for step in range(steps):
        if step == 2 and config.get("accumulation", 1) > 1:  # a loop of one's own too
            for _ in range(engine.sizes.accumulation):
                engine.backward(engine(samples))
                engine.step()
        else:
            engine.train_batch([(samples,)] * engine.sizes.accumulation)
    engine.zero.close()
    return said


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Messages so far, of runs of which none is too small."""
    monkeypatch.setattr(run_advice, "FLOOR", 0.0)
    monkeypatch.setattr(rules, "TRIFLE", 0)
    return _heard()


def _heard() -> list[str]:
    found: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger = logging.getLogger("megatron_ds.engine.engine")
    logger.handlers[:] = [Ear()]
    return found


# --- activations


def saved_by(net: nn.Module, samples: Tensor) -> int:
    """Bytes that plain autograd keeps of one forward pass besides the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    found: dict[int, Tensor] = {}

    def pack(saved: Tensor) -> Tensor:
        if saved.untyped_storage().data_ptr() not in parameters:
            found[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        net(samples)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_activations_are_those_that_plain_autograd_keeps(reentrant: bool) -> None:
    samples = torch.randn(64, 16)
    net = Net(reentrant=reentrant)
    meter = ActivationMeter(net)
    for _ in range(2):  # the second pass is not counted
        with meter.forward():
            loss = net(samples)
        loss.backward()
    found = meter.result()
    without = saved_by(Net(), samples)
    block = saved_by(Net().blocks[0], samples)
    assert found is not None
    assert found.no_recompute == pytest.approx(without, rel=0.02)
    assert found.recompute_peak == pytest.approx(block - 4096, rel=0.02)  # its input is kept
    assert found.stored < 0.3 * without
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    gradients = [p.grad for p in net.parameters()]
    plain = Net()
    for _ in range(2):
        plain(samples).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, plain.parameters()) if a is not None)  # type: ignore[arg-type]


def test_a_model_without_recomputation_has_nothing_to_say_of_it() -> None:
    net = Net()
    meter = ActivationMeter(net)
    with meter.forward():
        net(torch.randn(4, 16)).backward()
    assert meter.result() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_that_saves_little_of_the_peak(said: list[str], reentrant: bool) -> None:
    few, many = torch.randn(2, 64), torch.randn(4096, 64)
    (text,) = trained(said, Net(64, reentrant), few, {"accumulation": 3})
    assert "with 3 micro-batches a step" in text and "use model.gradient_checkpointing_disable()" in text
    said.clear()
    stage_3 = {"stage": 3, "persistence_threshold": 20}
    assert len(trained(said, Net(64, reentrant), few, {"accumulation": 3, "zero": stage_3})) == 1
    said.clear()
    assert trained(said, Net(64, reentrant), many, {"accumulation": 3}) == []  # it saves most of the peak
    assert trained(said, Net(64, reentrant), few, {"accumulation": 1}) == []
    assert trained(said, Net(64), few, {"accumulation": 3}) == []


def test_a_model_of_transformers_that_recomputes(said: list[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    for recompute, told in ((True, 1), (False, 0)):
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=16, **sizes))
        if recompute:
            model.gradient_checkpointing_enable()
        engine = megatron_ds.initialize(model, {"accumulation": 2})
        tokens = torch.randint(0, 61, (1, 4))
        for _ in range(3):
            engine.train_batch([{"input_ids": tokens, "labels": tokens}] * 2)
        engine.zero.close()
        assert len(said) == told, said
        said.clear()


def test_a_small_run_is_told_nothing() -> None:
    found = _heard()
    assert trained(found, Net(64, False), torch.randn(2, 64), {"accumulation": 3}) == []


# --- transfers


@pytest.mark.parametrize("batches", [True, False])
def test_transfers_that_take_longer_than_the_measured_compute(
    said: list[str], monkeypatch: pytest.MonkeyPatch, batches: bool
) -> None:
    """A model of which every forward pass takes 50 ms: told above, not below."""
    offload = {"device": "cpu", "ratio": 0.5}
    config = {"accumulation": 2, "zero": {"stage": 1, "bucket_mb": 0.004, "offload_optimizer": offload}}
    for slower, told in ((30.0, 1), (0.5, 0)):
        net = Net(sleep=0.05)
        engine = megatron_ds.initialize(net, config)
        places = engine.zero.bytes_by_store()
        away = places["master"]["host"] + places["optimizer"]["host"]
        monkeypatch.setitem(run_advice.LINKS, "cpu", Link(away / (0.1 * slower), 1e12, True))
        for _ in range(3):
            if batches:
                engine.train_batch([(torch.randn(2, 16),)] * 2)
            else:
                for _ in range(2):
                    engine.backward(engine(torch.randn(2, 16)))
                    engine.step()
        engine.zero.close()
        assert len(said) == told, said
        if told:
            seconds = re.search(r"a step computes for ([\d.]+) s; use a ratio of at most ([\d.]+)", said[0])
            assert seconds is not None and 0.1 <= float(seconds[1]) < 3, said[0]
            assert "zero.offload_optimizer.ratio=0.5 moves" in said[0] and "3 s at " in said[0]
        assert not engine.train_step.timed
        said.clear()


def test_an_offload_that_is_a_trifle_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _heard()
    monkeypatch.setitem(run_advice.LINKS, "cpu", Link(1.0, 1.0, True))
    config = {"zero": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    assert trained(found, Net(), torch.randn(2, 16), config) == []


def recomputing(stage: int) -> list[str]:
    run_advice.FLOOR = 0.0
    zero = {"stage": stage, **({"persistence_threshold": 20} if stage == 3 else {})}
    return trained(_heard(), Net(64, False), torch.randn(2, 64), {"accumulation": 3, "zero": zero})


def test_sharded_parameters_are_no_activations() -> None:
    """The activations that are named are the same at every stage."""
    named = []
    for stage in (1, 3):
        said, nothing = run_ranks(recomputing, 2, stage)
        found = [text for text in said if text.startswith("recomputation takes")]
        assert len(found) == 1 and nothing == [], said
        named.append(found[0].split(" off the activations")[0])
    assert named[0] == named[1], named


def on_a_rank(folder: str) -> list[str]:
    rules.TRIFLE = 0
    run_advice.LINKS["nvme"] = Link(1e3, 1e3, False)
    config = {"zero": {"stage": 2, "offload_optimizer": {"device": "nvme", "path": folder}}}
    samples = torch.randn(2, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
    return trained(_heard(), Net(), samples, config)


def test_rank_0_says_it_once(tmp_path: Path) -> None:
    (text,), nothing = run_ranks(on_a_rank, 2, str(tmp_path))
    assert "zero.offload_optimizer.ratio=1 moves" in text and nothing == []


# --- master weights


def test_low_precision_parameters_that_the_engine_does_not_hold(said: list[str]) -> None:
    for dtype, unfrozen, told in (
        (torch.bfloat16, True, 1),
        (torch.bfloat16, False, 0),
        (torch.float16, True, 1),
        (torch.float32, True, 1),
    ):
        net = Net().to(dtype)
        net.blocks[1].requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
        engine = megatron_ds.initialize(net, None, optimizer)
        if unfrozen:
            net.blocks[1].requires_grad_(True)
        for _ in range(3):
            engine.train_batch([(torch.randn(2, 16, dtype=dtype),)])
        engine.zero.close()
        assert len(said) == told, said
        if told and dtype == torch.float32:
            assert said[0].startswith("blocks.1.first.weight and 3 more are not among what the engine trains")
        elif told:
            assert said[0].startswith("bf16 parameters" if dtype == torch.bfloat16 else "fp16 parameters")
            assert "lr=0.0001" in said[0]
            assert "blocks.1.first.weight and 3 more are not among what the engine trains" in said[0]
        said.clear()


def test_an_optimizer_without_masters(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = megatron_ds.initialize(Net().bfloat16())
    places = engine.zero.bytes_by_store()
    assert sum(places["master"].values()) > 0
    monkeypatch.setattr(engine.zero, "bytes_by_store", lambda: {**places, "master": {"device": 0}})
    for _ in range(3):
        engine.train_batch([(torch.randn(2, 16).bfloat16(),)])
    engine.zero.close()
    assert len(said) == 1 and "keep fp32 master weights" in said[0]


# --- loops


class Parts(nn.Module):
    """Of four layers the one of each rank's number, or ``both`` ranks' the first, and never the last two."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.layers, self.both = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), both
        self.layers[2].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0 if self.both else dist.get_rank()](x).square().mean()


def told_of_unused(both: bool) -> list[str]:
    x, config = torch.randn(2, 4, generator=torch.Generator().manual_seed(dist.get_rank())), {"accumulation": 2}
    return trained(_heard(), Parts(both), x, {**config, "zero": {"stage": 2}})


@pytest.mark.parametrize("both", [False, True])
def test_parameters_that_no_rank_has_used_are_named_once(both: bool) -> None:
    (text,), nothing = run_ranks(told_of_unused, 2, both)
    unused = "layers.1.weight and 3 more" if both else "layers.3.weight and 1 more"
    assert text.startswith(f"{unused} got no gradient in the first step") and nothing == []


@pytest.mark.parametrize(("every", "told"), [(1, 1), (3, 0), (9, 0)])
def test_a_scheduler_that_the_loop_steps_too(said: list[str], every: int, told: int) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    engine = megatron_ds.initialize(net, None, optimizer, scheduler)
    for step in range(8):
        engine.train_batch([(torch.randn(2, 16),)])
        if (step + 1) % every == 0:
            scheduler.step()
    assert len(said) == told and all("twice its pace" in text for text in said)
    engine.close()
