"""What runs on the ranks of test_engine_checkpoints.py and test_engine_use.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import STEPS, Case, Ran, engine_of, look, model, own_samples, samples, take_step
from torch import Tensor, nn

import megatron_ds
from megatron_ds.engine import Engine
from megatron_ds.errors import MegatronDSError


def message(function: Any, *arguments: Any, **keywords: Any) -> str:
    try:
        function(*arguments, **keywords)
    except MegatronDSError as error:
        return str(error)
    return ""


def close(engine: Engine) -> None:
    if dist.is_initialized():
        dist.barrier()
    engine.zero.close()


# --- checkpoints


def save_after_two(case: Case, folder: str) -> None:
    engine = engine_of(case)
    for step in range(2):
        take_step(engine, step, Ran())
    engine.module.norm.running_mean.fill_(0.25)  # type: ignore[union-attr, operator]
    engine.save_checkpoint(folder, {"consumed": 36})
    close(engine)


def go_on(case: Case, folder: str) -> Ran:
    """From the checkpoint, into a model with other weights and statistics, to the end."""
    engine = engine_of(case, model(seed=99))
    assert engine.load_checkpoint(folder) == {"consumed": 36}
    assert engine.steps == 2
    norm: Any = engine.module.norm
    assert bool((norm.running_mean == 0.25).all())
    norm.running_mean.zero_()
    ran = Ran()
    take_step(engine, 2, ran)
    look(engine, ran)
    close(engine)
    return ran


def saved_and_continued(case: Case, others: list[Case], folder: str) -> list[Ran]:
    save_after_two(case, folder)
    return [go_on(other, folder) for other in others]


def saved_within_a_step(cases: list[Case], folder: str) -> list[list[Ran]]:
    """To the end of a run that saves between micro-batches of its last step; and again from that checkpoint."""
    found = []
    for number, case in enumerate(cases):
        runs = []
        for loads in (False, True):
            engine, ran = engine_of(case, model(seed=99) if loads else None), Ran()
            if loads:
                engine.load_checkpoint(f"{folder}/{number}")
            for step in range(engine.steps, STEPS):
                for part, batch in enumerate(own_samples(engine, step)):
                    engine.backward(engine(batch))
                    if not loads and step == STEPS - 1 and part == 0:
                        engine.save_checkpoint(f"{folder}/{number}", within_step=True)
                    result = engine.step()
                assert result is not None
                ran.losses.append(result.loss)
            look(engine, ran)
            close(engine)
            runs.append(ran)
        found.append(runs)
    return found


def kept_while_steps_fail(folder: str) -> list[list[int]]:
    """The checkpoints after each save with ``keep_last=1``: after two good steps, two skipped ones and a good one."""
    engine = engine_of(Case("SGD"))
    found = []
    for factor in (1.0, 1.0, float("nan"), float("nan"), 1.0):
        for batch in own_samples(engine, 0):
            engine.backward(engine(batch) * factor)
            engine.step()
        engine.save_checkpoint(folder, keep_last=1)
        found.append(sorted(int(path.name.removeprefix("step-")) for path in Path(folder).glob("step-*")))
    assert engine.skipped == 2
    close(engine)
    return found


def refusals(folder: str) -> dict[str, str]:
    found = {}
    engine = engine_of(Case("AdamW"))
    take_step(engine, 0, Ran())
    path = f"{folder}/refused"
    found["missing"] = message(engine.load_checkpoint, path)
    found["client"] = message(engine.save_checkpoint, path, {"a": [{"b": object()}]})
    engine.save_checkpoint(path)
    close(engine)
    other = engine_of(Case("SGD"))
    found["class"] = message(other.load_checkpoint, path)
    other.load_checkpoint(path, weights_only=True)
    assert other.steps == 0
    close(other)
    groups = model()
    two = [{"params": [p]} for p in groups.parameters() if p.requires_grad]
    split = megatron_ds.initialize(groups, Case().config, torch.optim.AdamW(two, amsgrad=True))
    found["groups"] = message(split.load_checkpoint, path)
    close(split)
    return found


# --- use


def looking_inside(stage: int) -> dict[str, Any]:
    """Get and set of whole tensors, the gather context, and what comes of them in the next step."""
    engine = engine_of(Case("AdamW", stage))
    take_step(engine, 0, Ran())
    found: dict[str, Any] = {"steps": engine.steps, "keys": sorted(engine.state_dict())}
    value = torch.arange(64.0, dtype=torch.float64).view(8, 8)
    engine.set_parameter("twice.weight", value)
    assert torch.equal(engine.get_parameter("twice.weight").cpu(), value)
    engine.set_parameter("frozen.bias", value[0])
    engine.set_optimizer_state("output.weight", "exp_avg", value[:1])
    assert torch.equal(engine.get_optimizer_state("output.weight", "exp_avg").cpu(), value[:1])
    net: Any = engine.module
    with engine.gathered([net.inputs.weight], write=True):
        if engine.mesh.rank == 0:
            net.inputs.weight.data.fill_(0.5)  # the others' stays: rank 0's holds
    with engine.gathered():
        found["read"] = [bool((net.inputs.weight == 0.5).all()), torch.equal(net.twice.weight.cpu(), value)]
    state = engine.state_dict()
    found["state"] = [bool((state["inputs.weight"] == 0.5).all()), torch.equal(state["frozen.bias"], value[0])]
    found["unknown"] = message(engine.get_parameter, "twice.wait")
    found["kind"] = message(engine.get_optimizer_state, "twice.weight", "exp_average")
    found["shape"] = message(engine.set_parameter, "twice.weight", value[0])
    found["early"] = message(engine.get_gradient, "twice.weight")
    found["bytes"] = sum(engine.bytes_report().values())
    found["table"] = engine.bytes_table()
    ran = Ran()
    take_step(engine, 1, ran)
    found["loss"] = ran.losses[0]
    close(engine)
    return found


def order_of_calls() -> dict[str, str]:
    engine = engine_of(Case("AdamW", accumulation=3))
    found = {"nothing": message(engine.step)}
    first, *rest = own_samples(engine, 0)
    found["vector"] = message(engine.backward, engine(first).expand(2))
    engine.backward(engine(first))
    assert engine.step() is None and not engine.is_boundary
    found["train_batch"] = message(engine.train_batch, [(first,)] * 3)
    found["closure"] = message(engine.step, lambda: None)
    for batch in rest:
        engine.backward(engine(batch))
    assert engine.is_boundary
    found["extra"] = message(engine.backward, engine(first))
    assert engine.step() is not None
    found["few"] = message(engine.train_batch, [(first,)])
    found["loss"] = message(engine.train_batch, [{"samples": first}] * 3) or "none"
    close(engine)
    shapeless = nn.Linear(2, 2)
    plain = megatron_ds.initialize(shapeless)
    found["no loss"] = message(plain.train_batch, [torch.ones(3, 2)])
    close(plain)
    return found


def deferred(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """no_sync() for all but the last micro-batch, whose number the configuration does not know."""
    engine, losses = engine_of(case), []
    axis = engine.mesh.data
    engine.train()
    for step, parts in enumerate((3, 1)):
        cut = samples(step).chunk(axis.size)[axis.rank].chunk(parts)
        for number, batch in enumerate(cut):
            if number < len(cut) - 1:
                with engine.no_sync():
                    engine.backward(engine(batch))
                    assert engine.step() is None
            else:
                engine.backward(engine(batch))
        result = engine.step()
        assert result is not None
        losses.append(result.loss)
    parameters = {name: engine.get_parameter(name) for name, _ in engine.module.named_parameters()}
    close(engine)
    return losses, parameters


def rest_of_an_epoch() -> tuple[float, dict[str, Tensor]]:
    """One of three micro-batches, and step(partial=True)."""
    engine = engine_of(Case("SGD", 2, accumulation=3))
    axis = engine.mesh.data
    engine.train()
    engine.backward(engine(samples(0).chunk(axis.size)[axis.rank]))
    result = engine.step(partial=True)
    assert result is not None
    parameters = {name: engine.get_parameter(name) for name, _ in engine.module.named_parameters()}
    close(engine)
    return result.loss, parameters


def half_precision(dtype: str) -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    before = net[0].weight.detach().clone()
    config: dict[str, Any] = {
        "precision": {"dtype": dtype, **({"initial_loss_scale": 2.0**24} if dtype == "fp16" else {})},
        "optimizer": {"lr": 1e-2},
        "cast_inputs": True,
    }
    engine = megatron_ds.initialize(net, config, loss=lambda call, batch: call(batch).float().square().mean())
    results = [engine.train_batch([samples(step).float() * 20]) for step in range(24)]
    close(engine)
    return {
        "dtype": str(net[0].weight.dtype),
        "skipped": [result.skipped for result in results],
        "losses": [result.loss for result in results],
        "scales": [result.loss_scale for result in results],
        "moved": not torch.equal(before.to(net[0].weight.dtype), net[0].weight.detach()),
    }


# --- models without memory


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("table", torch.arange(16.0))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.second(torch.tanh(self.first(hidden + self.table)))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(6, 16)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.output = nn.Linear(16, 1)
        self.output_again = nn.Linear(16, 1)
        self.output_again.weight = self.output.weight

    def forward(self, samples: Tensor) -> Tensor:
        hidden = self.inputs(samples)
        for block in self.blocks:
            hidden = block(hidden)
        return (self.output(self.frozen(hidden)) + self.output_again(hidden)).square().mean()


def without_memory(stage: int, weights: str | None, save: str | None) -> tuple[dict[str, Tensor], float, list[bool]]:
    """Initial weights, the loss after a step, and whether parameters were on the meta device and buffers were not."""
    with megatron_ds.empty_parameters():
        net = Deep()
    empty = [p.is_meta for p in net.parameters()] + [not b.is_meta for b in net.buffers()]
    empty.append(net.output.weight is net.output_again.weight)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    config = {"zero": {"stage": stage, **({"persistence_threshold": 20} if stage == 3 else {})}, "seed": 5}
    engine = megatron_ds.initialize(net, config, optimizer, weights=weights)
    state = engine.state_dict()
    if save is not None and engine.mesh.rank == 0:
        from safetensors.torch import save_file

        Path(save).mkdir()
        save_file(
            {k: v.clone() for k, v in state.items() if k != "output_again.weight"}, Path(save) / "model.safetensors"
        )
    axis = engine.mesh.data
    result = engine.train_batch([(samples(0).float().chunk(axis.size)[axis.rank],)])
    again = engine.train_batch([(samples(0).float().chunk(axis.size)[axis.rank],)])
    assert again.loss < result.loss
    close(engine)
    return state, again.loss, empty


def models_without_memory(folder: str) -> list[Any]:
    runs = [without_memory(3, None, f"{folder}/saved")]
    if dist.is_initialized():
        dist.barrier()
    runs += [without_memory(1, None, None), without_memory(3, f"{folder}/saved", None)]
    return runs


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 4))

    def forward(self, samples: Tensor) -> Tensor:
        return (samples @ self.table).mean()


def weights_of_another_shape(folder: str) -> str:
    """One row for four, which copying would repeat."""
    from safetensors.torch import save_file

    save_file({"table": torch.ones(1, 4)}, f"{folder}/rows.safetensors")
    with megatron_ds.empty_parameters():
        net = Raw()
    return message(megatron_ds.initialize, net, weights=folder)


def what_has_no_initialisation() -> tuple[str, bool]:
    with megatron_ds.empty_parameters():
        net, other = Raw(), Raw()
    refused = message(megatron_ds.initialize, net)
    engine = megatron_ds.initialize(other, weights=lambda module: nn.init.constant_(module.table, 2.0))
    filled = bool((engine.state_dict()["table"] == 2.0).all())
    close(engine)
    return refused, filled
