"""Pipelines of several stages by DeepSpeed's names: on every mesh the numbers of plain torch, in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megatron_ds.errors import ConfigError, EngineError
from megatron_ds.integrations import deepspeed
from megatron_ds.integrations.deepspeed.pipe.packed import pack, unpack
from megatron_ds.testing import run_ranks

WORDS, WIDTH, MICROS, STEPS, SAVED = 11, 6, 4, 4, 2
LR, DECAY, CLIP = 0.05, 0.1, 0.3


class Embed(nn.Embedding):
    """From token ids and a mask to ``(hidden, mask)``."""

    def __init__(self) -> None:
        super().__init__(WORDS, WIDTH)
        self.register_buffer("places", torch.arange(9.0))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ids, mask = inputs
        return super().forward(ids) + self.places[: ids.shape[1], None], mask


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, mask = inputs
        if self.training:
            self.calls += 1
        return hidden + torch.tanh(self.linear(hidden)) * mask[..., None], mask


def to_words(embed: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
    return inputs[0] @ embed.weight.T  # type: ignore[operator]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def layers() -> list[Any]:
    """Two modules that are tied over stages, one of them the first and the last layer."""
    spec, tied = deepspeed.pipe.LayerSpec, deepspeed.pipe.TiedLayerSpec
    embed, middle = tied("embed", Embed), tied("middle", Block)
    return [embed, spec(Block), middle, spec(Block), spec(Block), middle, tied("embed", Embed, forward_fn=to_words)]


def micro_batch(step: int, number: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Of a length of its own."""
    generator = torch.Generator().manual_seed(100 * step + number)
    ids, labels = torch.randint(0, WORDS, (2, 3, 4 + number), generator=generator)
    return (ids, torch.rand(ids.shape, generator=generator) < 0.8), labels


@functools.cache
def plain() -> tuple[list[float], dict[str, Tensor], float]:
    """Losses of the steps and of an evaluation, and the weights, of one module in plain torch."""
    made: dict[str, nn.Module] = {}
    names = []
    for index, layer in enumerate(layers()):
        name = f"tied_modules.{layer.key}" if isinstance(layer, deepspeed.pipe.TiedLayerSpec) else str(index)
        if name not in made:
            torch.manual_seed(1234 + index)  # as seed_layers does
            made[name] = layer.build().double()
        names.append(name)
    parameters = [parameter for module in made.values() for parameter in module.parameters()]
    adam = torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY)

    def loss(step: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for number in range(MICROS):
            value, labels = micro_batch(step, number)
            for name in names[:-1]:
                value = made[name](value)
            total = total + loss_of(to_words(made[names[-1]], value), labels) / MICROS
        return total

    losses = []
    for step in range(STEPS):
        adam.zero_grad()
        mean = loss(step)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        adam.step()
        losses.append(mean.item())
    for module in made.values():
        module.eval()
    weights = {f"{of}.{name}": value for of, module in made.items() for name, value in module.state_dict().items()}
    return losses, weights, loss(STEPS).item()


def config(stage: int, dp: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": MICROS // dp,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def made(stages: int, zero: int, **more: Any) -> Any:
    model = deepspeed.PipelineModule(layers(), num_stages=stages, loss_fn=loss_of, seed_layers=True, **more).double()
    dp = (dist.get_world_size() if dist.is_initialized() else 1) // stages
    return deepspeed.initialize(model=model, config=config(zero, dp))[0]


def batches(engine: Any, step: int) -> Iterator[Any] | None:
    """Of this rank; a stage in the middle needs none."""
    if not (engine.is_first_stage() or engine.is_last_stage()):
        return None
    share = engine.micro_batches
    first = engine.engine.mesh.data.rank * share
    return iter([micro_batch(step, number) for number in range(first, first + share)])


def trained(stages: int, zeros: tuple[int, ...], folder: str, saves: bool, **more: Any) -> list[Any]:
    found = []
    for zero in zeros:
        engine = made(stages, zero, **more)
        first, folder_of = 0, f"{folder}/{zero % 2}"
        if not saves:
            path, client = engine.load_checkpoint(folder_of)
            assert path is not None and client == {"at": SAVED}
            first = SAVED
        losses = []
        for step in range(first, STEPS):
            losses.append(engine.train_batch(batches(engine, step)).item())
            if saves and step + 1 == SAVED:
                engine.save_checkpoint(folder_of, client_state={"at": SAVED})
        evaluated = engine.eval_batch(batches(engine, STEPS)).item()
        weights = {name: value.tolist() for name, value in engine.module_state_dict().items()}
        found.append([zero, first, losses, evaluated, weights, engine.global_steps, engine.micro_steps])
    return found


def check(ranks: list[Any]) -> None:
    losses, weights, evaluated = plain()
    for runs in zip(*ranks, strict=True):
        seen = set()
        for zero, first, got, got_evaluated, got_weights, steps, _ in runs:
            assert got == pytest.approx(losses[first:], rel=1e-10), zero
            assert got_evaluated == pytest.approx(evaluated, rel=1e-10) and steps == STEPS
            for name, value in got_weights.items():
                found = torch.tensor(value, dtype=weights[name].dtype)
                if name.endswith("calls"):  # of the rank's own micro-batches
                    assert found > 0
                else:
                    assert (found - weights[name]).abs().max() < 1e-9, (zero, name)
            seen |= got_weights.keys()
        assert seen == weights.keys()  # all the stages together have the whole model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Checkpoints of two stages, at ZeRO stages 0 and 1, from runs that give the numbers of plain torch."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    check(run_ranks(trained, 2, 2, (0, 1), folder, True))
    return folder


@pytest.mark.parametrize(
    ("ranks", "stages", "zeros", "more"),
    [
        (1, 1, (0, 1), {"activation_checkpoint_interval": 2}),
        (4, 2, (0, 1, 3), {"partition_method": "uniform"}),
        (4, 4, (1,), {"partition_method": "type:block"}),
    ],
)
def test_any_number_of_stages_goes_on_from_a_checkpoint_of_two(
    ranks: int, stages: int, zeros: tuple[int, ...], more: dict[str, Any], saved: str
) -> None:
    check(run_ranks(functools.partial(trained, **more), ranks, stages, zeros, saved, False))


class Ids(nn.Module):
    """A first stage with nothing that requires a gradient in its output: a frozen table, and the ids themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(12.0).view(4, 3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.table[ids], ids


class Pick(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return (inputs[0] * self.weight).sum(-1) + inputs[1]


def odd() -> list[Any]:
    """Of a stage without gradients in its output: the loss, the other stage's weight after one update, errors."""
    torch.manual_seed(0)
    model = deepspeed.PipelineModule([Ids(), Pick()], 2, loss_fn=nn.functional.mse_loss, partition_method="uniform")
    engine, _, _, scheduler = deepspeed.initialize(
        model=model,
        config={
            "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1, "warmup_max_lr": 0.01}},
        },
    )
    batch = (torch.tensor([1, 3]), torch.tensor([0.25, 0.5]))
    engine.set_batch_fn(lambda given: given[::-1])
    engine.set_dataiterator(iter([batch[::-1]]))
    losses = [engine.train_batch().item()]
    engine.set_dataloader([batch[::-1]])  # which begins anew
    losses += [engine.train_batch().item() for _ in range(2)]
    said = []
    for call in (
        lambda: engine(batch[0]),
        lambda: engine.save_16bit_model("/nowhere"),
        lambda: engine.eval_batch(iter([batch]), return_logits=True),
    ):
        try:
            call()
        except (ConfigError, EngineError) as error:
            said.append(str(error))
    weight = None if engine.is_first_stage() else model.get_submodule("1").weight.tolist()
    return [losses, weight, said, engine.num_stages, engine.stage_id, engine.was_step_applied(), scheduler is not None]


def test_a_stage_may_hand_over_what_needs_no_gradient() -> None:
    first, last = run_ranks(odd, 2)
    weight = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    ids, labels = torch.tensor([1, 3]), torch.tensor([0.25, 0.5])
    loss = nn.functional.mse_loss((torch.arange(12.0).view(4, 3)[ids] * weight).sum(-1) + ids, labels)
    assert first[0] == last[0] and first[0][0] == pytest.approx(loss.item()) and len(first[0]) == 3
    assert first[1] is None and (first[3:5], last[3:5]) == ([2, 0], [2, 1]) and last[5] and last[6]
    for said in (first[2], last[2]):
        assert "call train_batch(data_iter)" in said[0] and "python tools/zero_to_fp32.py" in said[1]
        assert "gives the mean loss alone; let loss_fn return" in said[2]


def test_what_goes_between_stages_comes_back_as_it_was() -> None:
    leaf = torch.randn(3, 2, dtype=torch.bfloat16, requires_grad=True)
    wide = torch.randn((), requires_grad=True)
    given = (leaf, torch.tensor([True, False, True]), wide, torch.tensor([[2**53 + 1]]), torch.tensor([float("nan")]))
    flat = pack(given, None)
    assert flat.dim() == 1 and flat.dtype == torch.float32 and flat.requires_grad
    hidden = flat.detach().requires_grad_()
    got = unpack(hidden)
    assert [part.dtype for part in got] == [part.dtype for part in given]
    assert all(torch.equal(a, b) for a, b in zip(got[:4], given)) and got[4].isnan().all()
    (got[0].float().square().sum() * got[2]).backward()
    flat.backward(hidden.grad)
    assert leaf.grad is not None and wide.grad == leaf.detach().float().square().sum()
    assert torch.equal(leaf.grad, (2 * leaf.detach().float() * wide.detach()).to(torch.bfloat16))
    alone = unpack(pack(leaf.detach(), hidden))
    assert isinstance(alone, Tensor) and torch.equal(alone, leaf) and isinstance(unpack(pack((leaf,), None)), tuple)
    with pytest.raises(EngineError, match="returned dict; between two stages go a tensor, or a tuple"):
        pack({"hidden": leaf}, None)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"of torch\.complex64, which does not go.*torch\.view_as_real"):
        pack(torch.ones(2, dtype=torch.complex64, requires_grad=True), None)


class Topology:
    def get_axis_names(self) -> list[str]:
        return ["pipe", "data", "model"]

    def get_dim(self, axis: str) -> int:
        return 2 if axis == "model" else 1


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({}, "needs num_stages= or topology="),
    ({"num_stages": 2}, "num_stages=2 does not divide the 1 ranks"),
    ({"topology": Topology()}, r"model-parallel ranks \(model\); use PipeDataParallelTopology"),
    ({"num_stages": 1, "partition_method": "profile"}, "use 'parameters', 'uniform' or 'type:REGEX'"),
    ({"num_stages": 1, "partition_method": "type:Conv"}, "finds none of the layers Linear, tanh"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_stages_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed.PipelineModule([nn.Linear(2, 2), torch.tanh], **arguments)


def test_an_argument_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="takes no stages; it takes activation_checkpoint_func"):
        deepspeed.PipelineModule([nn.Linear(2, 2)], num_stages=1, stages=2)


def idle_stage() -> str:
    topology = deepspeed.pipe.PipeDataParallelTopology(num_pp=2, num_dp=1)
    model = deepspeed.PipelineModule([nn.Linear(2, 2), torch.tanh], topology=topology)
    try:
        deepspeed.initialize(model=model, config=config(0, 1))
    except ConfigError as error:
        return str(error)
    return ""


def test_a_stage_without_parameters_is_named_on_every_rank() -> None:
    for said in run_ranks(idle_stage, 2):
        assert "stages [1] of 2 have no parameters that require a gradient" in said
