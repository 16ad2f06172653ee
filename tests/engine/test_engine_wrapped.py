"""Models that come compiled, or wrapped by another library: the numbers, the names, what is saved, what is refused.

Compiled without a code generator ("aot_eager"): the graphs are made, and every operator is torch's own.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import STEPS, batch_of, loss_of, made, plain
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from trainer_cases import place_in_environment
from trainer_cases import trained as trained_by_trainer

import megatron_ds
from megatron_ds.engine.model_check import check_model
from megatron_ds.errors import ConfigError
from megatron_ds.testing import run_ranks

Ran = tuple[list[float], dict[str, Tensor], list[str]]


def graphs() -> int:
    """Calls that torch has compiled in this process."""
    return sum(torch._dynamo.utils.counters["stats"].values())


def forget_graphs() -> None:
    """What comes next compiles anew, and is counted from zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled(model: Any, how: str) -> nn.Module:
    if how == "whole":
        return torch.compile(model, backend="aot_eager")  # its own backward pass too; the others only trace forward
    if how == "in place":
        model.compile(backend="eager")
    elif how == "blocks":
        blocks = model.transformer.h
        for index, block in enumerate(blocks):
            blocks[index] = torch.compile(block, backend="eager")
    return model


def engine_of(how: str, stage: int) -> megatron_ds.Engine:
    model = compiled(made("gpt2"), how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    small = {"persistence_threshold": 0} if stage == 3 else {}
    config = {"zero": {"stage": stage, "bucket_mb": 0.01, **small}, "optimizer": {"clip_norm": 0.5}}
    return megatron_ds.initialize(model, config, optimizer, loss=loss_of)


def trained(how: str, stage: int, folder: str) -> Ran:
    """Losses, the weights of the saved folder as transformers loads it, and the names that the engine knows."""
    engine, losses = engine_of(how, stage), []
    axis = engine.mesh.data
    for step in range(STEPS):
        own = {key: value.chunk(axis.size)[axis.rank] for key, value in batch_of("gpt2", step).items()}
        losses.append(engine.train_batch([own]).loss)
    assert graphs() > 0, (how, stage)
    engine.save_pretrained(folder)
    engine.save_checkpoint(folder + "/checkpoint")
    state, names = engine.state_dict(), [name for name, _ in engine.module.named_parameters()]
    for name in ("transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"):  # names do not say what is compiled
        key = next(key for key in state if key.replace("_orig_mod.", "") == name)
        assert torch.equal(engine.get_parameter(name), state[key])
    engine.zero.close()
    other = engine_of("not", 1)
    other.load_checkpoint(folder + "/checkpoint")
    for key, value in other.state_dict().items():
        assert torch.equal(value, next(v for k, v in state.items() if k.replace("_orig_mod.", "") == key)), key
    other.zero.close()
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return losses, loaded.state_dict(), names


def all_trained(ways: tuple[str, ...], folder: str) -> dict[tuple[str, int], Ran]:
    found = {}
    for how, stage in product(ways, (2, 3)):
        forget_graphs()
        found[how, stage] = trained(how, stage, f"{folder}/{how}-{stage}")
    return found


@pytest.mark.parametrize("ways", [("whole",), ("in place", "blocks")], ids=" and ".join)
def test_a_compiled_model_trains_and_is_saved_as_it_is_without(ways: tuple[str, ...], tmp_path: Path) -> None:
    losses, parameters = plain("gpt2")
    own = [name for name, _ in made("gpt2").named_parameters()]
    for rank in run_ranks(all_trained, 2, ways, str(tmp_path), timeout=280):
        assert len(rank) == 2 * len(ways)
        for (how, stage), (got, loaded, names) in rank.items():
            assert got == pytest.approx(losses, rel=1e-9), (how, stage)
            assert loaded.keys() == parameters.keys()
            assert all((loaded[key] - value).abs().max() < 1e-9 for key, value in parameters.items()), (how, stage)
            # A block that was wrapped by the user keeps the name that torch gives it.
            assert how == "blocks" or names == own


class Fused(nn.Module):
    """Computes with the weight of its head by itself, as TRL's trainers let a model do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 5)
        self.double()

    def forward(self, samples: Tensor) -> Tensor:
        hidden = self.body(samples)
        hidden = hidden.to(self.head.weight.device)
        return (hidden @ self.head.weight.t()).square().mean()


def with_its_heads_weight(compiles: bool) -> list[float]:
    model: Any = Fused()
    if compiles:
        model.compile(backend="eager")
    config = {"zero": {"stage": 3, "persistence_threshold": 0}}
    engine = megatron_ds.initialize(model, config, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 4, dtype=torch.float64)))
        engine.step()
    weight = engine.get_parameter("head.weight")
    engine.close()
    return weight.flatten().tolist()


def test_a_compiled_model_may_use_the_weight_of_one_of_its_modules() -> None:
    plainly, found = run_ranks(both_ways, 2)[0]
    assert found == plainly


def both_ways() -> list[list[float]]:
    return [with_its_heads_weight(compiles) for compiles in (False, True)]


def refused() -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def fsdp2(net: nn.Module) -> nn.Module:
        return fully_shard(net, mesh=mesh)

    def split(net: nn.Module) -> nn.Module:
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        return parallelize_module(net, mesh, {"0": ColwiseParallel()})

    wrappers = {
        "ddp": nn.parallel.DistributedDataParallel,
        "compiled ddp": lambda net: torch.compile(nn.parallel.DistributedDataParallel(net)),
        "dp": nn.DataParallel,
        "fsdp": lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu")),
        "fsdp2": fsdp2,
        "dtensor": split,
    }
    said = {}
    for name, wrap in wrappers.items():
        model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        with pytest.raises(ConfigError) as raised:
            megatron_ds.initialize(model, {"zero": {"stage": 2}})
        said[name] = str(raised.value)
    return said


def test_what_another_library_has_wrapped_is_refused_on_all_ranks() -> None:
    for said in run_ranks(refused, 2):
        assert said["ddp"].startswith("the model is wrapped in DistributedDataParallel (torch.nn.parallel.distributed)")
        assert said["compiled ddp"].startswith("_orig_mod is wrapped in DistributedDataParallel")
        assert "wrapped in DataParallel" in said["dp"]
        assert "wrapped in FullyShardedDataParallel" in said["fsdp"]
        assert "wrapped in FSDPModule" in said["fsdp2"]
        assert said["dtensor"].startswith("0.weight is a DTensor")
        assert all("give initialize() the model as it was before" in text for text in said.values())


def test_a_weight_made_of_other_tensors_is_refused_where_it_would_be_a_plain_one() -> None:
    net = nn.Linear(4, 4, bias=False)
    net.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    with pytest.raises(ConfigError, match=r"weight is a TwoTensor, .* quantize after training"):
        megatron_ds.initialize(net, {}, torch.optim.SGD(net.parameters()))
    net.requires_grad_(False)
    check_model(net)
    with pytest.raises(ConfigError, match="weight is a TwoTensor"):
        check_model(net, ranks=2)


def by_the_trainer(output: str, stage: int) -> list[Any]:
    """With and without ``torch_compile``: logs, weights and whether anything was compiled."""
    config = {"zero": {"stage": stage}}
    plainly = trained_by_trainer(f"{output}/plain", config, 2)
    assert graphs() == 0
    return [plainly, trained_by_trainer(f"{output}/compiled", config, 2, torch_compile_backend="aot_eager"), graphs()]


def by_accelerate() -> list[tuple[dict[str, Tensor], int]]:
    """Without a plugin, with one, and with one that compiles block by block: weights, and calls that were compiled."""
    place_in_environment()
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    from megatron_ds.integrations.accelerate import prepare

    found = []
    for regional in (None, False, True):
        forget_graphs()
        plugin = regional is not None and TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=regional)  # type: ignore[arg-type]
        accelerator = Accelerator(cpu=True, dynamo_plugin=plugin or None)
        net = made("gpt2")
        model, optimizer = prepare(accelerator, net, torch.optim.SGD(net.parameters(), lr=0.1), {"zero": {"stage": 2}})
        for step in range(STEPS):
            accelerator.backward(loss_of(model, batch_of("gpt2", step)))
            optimizer.step()
        found.append((accelerator.get_state_dict(model), graphs()))
        model.engine.zero.close()
        accelerator.free_memory()
        type(accelerator.state)._reset_state(True)
    return found


def test_the_trainers_torch_compile_compiles(tmp_path: Path) -> None:
    for (logs, state), (got_logs, got), compiled in run_ranks(by_the_trainer, 2, str(tmp_path), 3):
        assert compiled > 0
        for a, b in zip(got_logs, logs, strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        assert got.keys() == state.keys()
        assert all((got[key] - value).norm() < 1e-4 * value.norm() for key, value in state.items())


def test_accelerates_dynamo_plugin_compiles() -> None:
    for (plainly, none), *compiled in run_ranks(by_accelerate, 2):
        assert none == 0 and len(compiled) == 2
        for got, count in compiled:
            assert count > 0
            assert all((got[key] - value).abs().max() < 1e-9 for key, value in plainly.items())
