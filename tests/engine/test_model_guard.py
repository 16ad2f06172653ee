"""A model changed behind the engine's back: an error with the way out, where training would go wrong silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megatron_ds
from megatron_ds.engine import Engine
from megatron_ds.errors import MegatronDSError
from megatron_ds.testing import run_ranks

WEIGHT = "layers.0.0.weight"
CASES = [(1, "fp32"), (2, "bf16"), (3, "bf16")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss_of(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def samples(dtype: torch.dtype) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def adamw(net: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def engine_of(net: nn.Module, stage: int, dtype: str) -> Engine:
    config: dict[str, Any] = {"zero": {"stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})}}
    if dtype != "fp64":
        config["precision"] = {"dtype": dtype}
    return megatron_ds.initialize(net, config, adamw(net), loss=loss_of)


def first(net: Any) -> nn.Parameter:
    parameter: nn.Parameter = net.layers[0][0].weight
    return parameter


def zeros(net: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in net.named_parameters()}


def toggled(net: Any) -> None:
    """As the discriminator of a GAN, while the generator trains."""
    net.requires_grad_(False)
    net.requires_grad_(True)


def rewrapped(net: Any) -> None:
    net.layers[1] = nn.Sequential(*net.layers[1])


def with_another_head(net: Any) -> None:
    net.head = nn.Linear(16, 2).to(net.head.bias.dtype)


def without_a_layer(net: Any) -> None:
    del net.layers[1]


Change = Callable[[Any], object]
# What is done to the model, and what is said at each of CASES; None: nothing, training goes on.
CHANGES: dict[str, tuple[Change, list[str | None]]] = {
    "freeze": (lambda net: net.layers[0].requires_grad_(False), [None] * 3),
    "half": (lambda net: net.half(), [f"{WEIGHT} has left the engine's memory"] * 2 + ["half() needs the values"]),
    "data": (
        lambda net: setattr(first(net), "data", torch.zeros(16, 16, dtype=first(net).dtype)),
        [f"{WEIGHT} has left the engine's memory"] * 2 + ["ZeRO stage 3 has sharded"],
    ),
    "resize": (
        lambda net: setattr(first(net), "data", torch.zeros(20, 16, dtype=first(net).dtype)),
        [f"{WEIGHT} has shape [20, 16] now and had [16, 16] at initialize()"] * 2 + ["ZeRO stage 3 has sharded"],
    ),
    "in place": (lambda net: first(net).detach().zero_(), [None, None, "ZeRO stage 3 has sharded"]),
    "assign": (
        lambda net: net.load_state_dict(zeros(net), assign=True),
        [f"{WEIGHT} is no longer a parameter of the model"] * 3,
    ),
    "head": (with_another_head, ["head.weight is no longer a parameter of the model"] * 3),
    "fewer": (without_a_layer, ["layers.1.0.weight is no longer a parameter of the model"] * 3),
    "toggle": (toggled, [None] * 3),
    "rewrap": (rewrapped, [None] * 3),
    "zero_grad": (lambda net: net.zero_grad(), [None] * 3),
    "to": (lambda net: net.to("cpu"), [None, None, "ZeRO stage 3 has sharded"]),
}


def changed(stage: int, dtype: str) -> dict[str, str]:
    """What each change says, by way of ``train_batch`` and of ``step``."""
    said = {}
    for name, (change, _) in CHANGES.items():
        for whole_batch in (True, False):
            net = Net()
            engine = engine_of(net, stage, dtype)
            x = samples(torch.float32 if dtype == "fp32" else torch.bfloat16)
            engine.train_batch([x])
            before = engine.state_dict()
            text = ""
            try:
                change(net)
                x = x.to(torch.float16) if name == "half" else x
                if whole_batch:
                    engine.train_batch([x])
                else:
                    engine.backward(loss_of(engine, x))
                    engine.step()
            except MegatronDSError as error:
                text = str(error)
            if not text:
                assert any(not torch.equal(value, before[key]) for key, value in engine.state_dict().items())
            assert said.setdefault(name, text).partition(";")[0] == text.partition(";")[0]
            if not text:
                engine.close()
    return said


@pytest.mark.parametrize("index", range(len(CASES)), ids=str)
def test_what_would_train_wrongly_is_said(index: int) -> None:
    for said in run_ranks(changed, 2, *CASES[index]):
        for name, (_, expected) in CHANGES.items():
            want = expected[index]
            assert (want in said[name]) if want else said[name] == "", (name, said[name])


def other_groups() -> list[str]:
    """What is said of a parameter that no model has, of one in another group, and of that beside an unfrozen one."""
    said = []
    for case in ("new", "moved", "moved beside one unfrozen"):
        net = Net()
        first, *others = net.parameters()
        others[-1].requires_grad_(case != "moved beside one unfrozen")
        trained = [p for p in others if p.requires_grad]
        optimizer = torch.optim.AdamW([{"params": [first]}, {"params": trained, "lr": 0.1}])
        engine = megatron_ds.initialize(net, {"zero": {"stage": 1}}, optimizer, loss=loss_of)
        if case == "new":
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        else:
            optimizer.param_groups.reverse()
        if case == "moved beside one unfrozen":
            others[-1].requires_grad_(True)
            optimizer.add_param_group({"params": others[-1:]})
        with pytest.raises(MegatronDSError) as raised:
            engine.train_batch([samples(torch.float32)])
        said.append(str(raised.value))
        engine.close()
    return said


def test_other_groups_of_the_optimizer_are_said() -> None:
    for new, *moved in run_ranks(other_groups, 2):
        assert "the optimizer's groups have other parameters than at initialize()" in new
        for said in moved:
            assert "is in another group of the optimizer than at initialize()" in said


@pytest.mark.parametrize("way", ["unfrozen", "added"])
def test_what_the_engine_does_not_train_is_said_once(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whenever it comes: layers are unfrozen one after the other in some recipes."""
    net: Any = Net()
    net.layers[0].requires_grad_(False)
    engine = engine_of(net, 2, "fp32")
    x = samples(torch.float32)
    for _ in range(12):
        engine.train_batch([x])
    assert not caplog.messages
    if way == "unfrozen":
        net.layers[0].requires_grad_(True)
    else:
        net.adapter = nn.Linear(4, 4)
    for _ in range(3):
        engine.train_batch([x])
    name = WEIGHT if way == "unfrozen" else "adapter.weight"
    assert [text.partition(" are not among")[0] for text in caplog.messages] == [f"{name} and 1 more"]
    if way == "added":
        with pytest.raises(MegatronDSError, match=r"adapter\.weight was added after initialize\(\).* put it back"):
            engine.state_dict()
    engine.close()


def written() -> None:
    """The ways that the messages name, in half precision."""
    for stage in (2, 3):
        net = Net()
        engine = engine_of(net, stage, "bf16")
        with engine.gathered(first(net), write=True), torch.no_grad():
            first(net).fill_(0.5)
        assert engine.get_parameter(WEIGHT).unique().tolist() == [0.5]
        engine.train_batch([samples(torch.bfloat16)])
        engine.set_parameter(WEIGHT, torch.full((16, 16), 0.25))
        engine.train_batch([samples(torch.bfloat16)])
        assert (engine.get_parameter(WEIGHT) - 0.25).abs().max() < 0.05
        with engine.gathered(first(net)):
            assert first(net).shape == (16, 16) and abs(first(net).float().mean().item() - 0.25) < 0.05
        engine.close()


def test_values_can_be_set_in_half_precision() -> None:
    run_ranks(written, 2)


def again(stage: int) -> dict[str, Tensor]:
    """A step, the first layer frozen, an engine anew, a step."""
    net = Net().double()
    for frozen in (False, True):
        net.layers[0].requires_grad_(not frozen)
        engine = engine_of(net, stage, "fp64")
        engine.train_batch([samples(torch.float64)])
        engine.close()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def joined(stage: int) -> dict[str, Tensor]:
    """Two models of two engines in one, of which one has more outputs than before."""
    nets = [Net().double() for _ in range(2)]
    for net in nets:
        engine = engine_of(net, stage, "fp64")
        engine.train_batch([samples(torch.float64)])
        engine.close()
    nets[1].head.weight.data, nets[1].head.bias.data = torch.ones(5, 16).double(), torch.ones(5).double()
    both = nn.ModuleList(nets)
    before = {name: p.detach().clone() for name, p in both.named_parameters()}
    engine = megatron_ds.initialize(both, {"zero": {"stage": stage}}, adamw(both))
    engine.backward(torch.stack([loss_of(net, samples(torch.float64)) for net in nets]).sum())
    engine.step()
    after = engine.state_dict()
    engine.close()
    assert all(not torch.equal(value, before[name]) for name, value in after.items())
    return {name: engine.module.get_parameter(name).detach().clone() for name in after}


def test_models_of_closed_engines_may_grow_and_be_joined() -> None:
    for stage in (1, 3):
        for after in run_ranks(joined, 2, stage):
            assert len(after) == 2 * len(list(Net().parameters())) and after["1.head.weight"].shape == (5, 16)


def test_a_closed_engine_leaves_the_model_for_the_next() -> None:
    net = Net().double()
    for frozen in (False, True):
        net.layers[0].requires_grad_(not frozen)
        optimizer = adamw(net)
        optimizer.zero_grad()
        loss_of(net, samples(torch.float64)).backward()
        optimizer.step()
    for stage in (1, 2, 3):
        for got in run_ranks(again, 2, stage):
            assert got.keys() == dict(net.named_parameters()).keys()
            for name, value in net.named_parameters():
                assert (got[name] - value).abs().max() < 1e-9, (stage, name)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table = nn.Embedding(6, 8).double()
        self.body = nn.Linear(8, 8).double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.table(tokens)).square().mean()

    def resize(self) -> None:
        """As ``resize_token_embeddings``: another table, with the old rows in it."""
        old, self.table = self.table, nn.Embedding(9, 8).double()
        with torch.no_grad():
            self.table.weight.fill_(0.5)[:6] = old.weight


def resized(stage: int) -> tuple[str, dict[str, Tensor]]:
    model = Tokens()
    config = {"zero": {"stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})}}
    engine = megatron_ds.initialize(model, config, adamw(model))
    tokens = torch.arange(6).roll(1)[None]
    for _ in range(2):
        engine.train_batch([tokens])
    with engine.gathered():
        model.resize()
    said = ""
    try:
        engine.train_batch([tokens])
    except MegatronDSError as error:
        said = str(error)
    engine.close()
    engine = megatron_ds.initialize(model, config, adamw(model))
    for _ in range(2):
        engine.train_batch([tokens + 3])
    state = engine.state_dict()
    engine.close()
    return said, state


def test_after_a_resized_table_closing_and_initializing_again_trains_as_in_plain_torch() -> None:
    model = Tokens()
    for add in (0, 3):
        optimizer = adamw(model)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.arange(6).roll(1)[None] + add).backward()
            optimizer.step()
        if not add:
            model.resize()
    for stage in (0, 1, 2, 3):
        for said, state in run_ranks(resized, 2, stage):
            assert "table.weight is no longer a parameter of the model" in said
            assert "call engine.close() and initialize() again" in said
            for name, value in model.state_dict().items():
                assert (state[name] - value).abs().max() < 1e-12, (stage, name)
