"""DeepSpeed's names that public scripts use, one by one: what they mean here, or the error that says what to do."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed_scripts as scripts
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import megatron_ds
from megatron_ds.errors import CheckpointError, ConfigError, EngineError
from megatron_ds.integrations import deepspeed
from megatron_ds.integrations.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from megatron_ds.testing import run_ranks

ROOT = Path(__file__).parents[2]
CONFIG = scripts.config(2, 2, **scripts.CLASSIFIER)


class Model(nn.Module):
    """With a method and an attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = scripts.net(1, 3)
        self.register_buffer("seen", torch.zeros(2))
        self.answer = 42

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.body(batch).square().mean()

    def generate(self, n: int) -> list[int]:
        return [self.answer] * n


def made(config: Any = CONFIG, **more: Any) -> Any:
    return deepspeed.initialize(model=Model(), config=config, **more)[0]


def steps(engine: Any, number: int = 2) -> None:
    for i in range(number):
        engine.backward(engine(torch.randn(4, 6, generator=torch.Generator().manual_seed(i))))
        engine.step()


def test_an_engine_answers_to_the_names_of_scripts() -> None:
    engine = made()
    assert isinstance(engine, nn.Module) and engine.device == torch.device("cpu")
    assert (engine.global_rank, engine.local_rank, engine.world_size, engine.dp_world_size) == (0, 0, 1, 1)
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (4, 2)
    assert (engine.gradient_accumulation_steps(), engine.gradient_clipping()) == (2, scripts.CLIP)
    assert engine.zero_optimization_stage() == 2 and engine.zero_optimization() and not engine.fp16_enabled()
    assert engine.zero_optimization_partition_gradients() and not engine.zero_optimization_partition_weights()
    assert engine.answer == 42 and engine.generate(2) == [42, 42] and engine.config is CONFIG
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = engine.nothing_such
    assert next(name for name, _ in engine.named_parameters()) == "module.body.0.weight"
    assert engine.get_global_grad_norm() is None and engine.get_lr() == [0.0] and not engine.was_step_applied()
    found = []
    for _ in range(4):
        found.append(engine.is_gradient_accumulation_boundary())
        steps(engine, 1)
        found.append(engine.was_step_applied())
    assert found == [False, False, True, True] * 2
    assert (engine.global_steps, engine.micro_steps, engine.skipped_steps, engine.global_samples) == (2, 4, 0, 8)
    assert engine.get_global_grad_norm() > 0 and engine.get_lr() == [pytest.approx(scripts.LR / 4)]
    assert engine.get_mom() == [(0.9, 0.999)] and engine.loss_scale() == 1.0
    assert engine.lr_scheduler.get_last_lr() == engine.get_lr() and engine.lr_scheduler.last_batch_iteration == 1
    assert engine.optimizer.param_groups[0]["weight_decay"] == scripts.DECAY and not engine.optimizer.overflow
    assert engine.eval().training is False and engine.module.training is False and engine.train().training
    assert not engine.is_compiled
    engine.compile(backend="eager")
    steps(engine, 2)
    assert engine.is_compiled and engine.global_steps == 3
    engine.destroy()
    assert not hasattr(engine.module.body[0].weight, "deepspeed_engine")


def test_what_is_moved_or_cast_is_as_it_was_or_an_error() -> None:
    engine = made()
    assert engine.to("cpu") is engine and engine.float() is engine and engine.to(engine.device) is engine
    with pytest.raises(EngineError, match=r"cannot be moved to torch\.float16.*use fp16\.enabled or bf16\.enabled"):
        engine.half()


def test_the_script_sets_the_boundary_and_keeps_the_graph() -> None:
    """Three backward passes in one update, each divided by the accumulation of 2, against plain torch."""
    model, plain = scripts.net(1, 3).double(), scripts.net(1, 3).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    config = scripts.config(1, 2, gradient_clipping=0.0)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=sgd, config=config)
    assert optimizer.optimizer is sgd
    batch = torch.randn(4, 6, dtype=torch.float64)
    engine.set_gradient_accumulation_boundary(False)
    loss = engine(batch).square().mean()
    engine.backward(loss, retain_graph=True)
    assert engine.backward(loss).item() == pytest.approx(loss.item() / 2)
    engine.step()
    assert not engine.was_step_applied()
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine(batch).square().mean(), scale_wrt_gas=False)
    optimizer.step()
    assert engine.was_step_applied() and engine.global_steps == 1
    (plain(batch).square().mean() * 2).backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(engine.module_state_dict()[name], parameter - 0.1 * parameter.grad, atol=1e-12), name


def gathered(stage: int) -> list[Any]:
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = Model().double()
    config = {**CONFIG, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    weight = model.body[0].weight
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):  # before an engine: the parameter itself
        deepspeed.zero.register_external_parameter(model, weight)
    engine = deepspeed.initialize(model=model, config=config)[0]
    rank = engine.global_rank
    other = deepspeed.initialize(model=Model().double(), config=config)[0]
    theirs = other.module.body[0].weight
    with deepspeed.zero.GatheredParameters([weight, theirs], modifier_rank=1), torch.no_grad():
        weight.fill_(float(rank + 1))
        theirs.fill_(float(rank + 1))
    assert (other.module_state_dict()["body.0.weight"] == 2.0).all()
    with deepspeed.zero.GatheredParameters(model.body, modifier_rank=None):
        inside = model.body[0].weight.tolist()
    steps_in = engine(torch.ones(2, 6, dtype=torch.float64))
    engine.backward(steps_in)
    engine.step()
    whole = deepspeed.utils.safe_get_full_fp32_param(weight)
    engine.backward(engine(torch.ones(2, 6, dtype=torch.float64)))
    gradient = deepspeed.utils.safe_get_full_grad(weight)
    norm = sum(deepspeed.utils.safe_get_full_grad(p).square().sum() for p in model.parameters()) ** 0.5
    zeros = torch.zeros(16, 6, dtype=torch.float64)
    deepspeed.utils.safe_set_full_optimizer_state(weight, zeros, "exp_avg")
    engine.step()
    assert norm == pytest.approx(engine.get_global_grad_norm(), rel=1e-9)
    moment = deepspeed.utils.safe_get_full_optimizer_state(weight, "exp_avg")
    clipped = gradient * min(1.0, float(engine.gradient_clipping() / (norm + 1e-6)))
    assert torch.allclose(moment, 0.1 * clipped, rtol=1e-9, atol=0), "of this one gradient alone"
    deepspeed.utils.safe_set_full_fp32_param(weight, zeros)
    assert not engine.module_state_dict()["body.0.weight"].any()
    state = engine.state_dict()
    doubled = {name: value * 2 for name, value in state.items()}
    engine.load_state_dict(doubled)
    again = engine.state_dict()
    matches = all(torch.equal(again[name], doubled[name]) for name in state)
    assert whole is not None and moment is not None
    return [inside, whole.tolist(), list(moment.shape), matches, list(state)]


@pytest.mark.parametrize("stage", [1, 3])
def test_parameters_are_seen_and_written_whole(stage: int) -> None:
    twos = torch.full((16, 6), 2.0).tolist()
    for inside, whole, shape, matches, names in run_ranks(gathered, 2, stage):
        assert inside == twos and whole == twos  # what rank 1 wrote; the first updates have a rate of 0
        assert shape == [16, 6] and matches
        assert sorted(names) == sorted(nn.ModuleDict({"module": Model()}).state_dict())


def resumed(folder: str, stage: int) -> list[Any]:
    config = {**CONFIG, "zero_optimization": {"stage": stage}}
    straight = made(config)
    steps(straight, 6)
    straight.save_checkpoint(folder, client_state={"epoch": 3, 1: (2.5, None)})
    straight.save_checkpoint(folder, tag="best", save_latest=False)
    torch.manual_seed(0)
    other = made(config)
    path, client = other.load_checkpoint(folder)
    steps(straight, 6)
    steps(other, 6)
    same = all(torch.equal(v, other.state_dict()[k]) for k, v in straight.state_dict().items())
    weights = made(config)
    weights.load_checkpoint(folder, tag="best", load_module_only=True)
    return [path, client, same, other.micro_steps, other.global_steps, other.get_lr(), weights.global_steps]


def told_of_a_damaged_tag(folder: str) -> str:
    (Path(folder) / "latest").write_bytes(b"\xff")
    with pytest.raises(CheckpointError) as told:
        made().load_checkpoint(folder)
    return str(told.value)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_by_tag_goes_on_where_it_was(ranks: int, tmp_path: Path) -> None:
    for path, client, same, micro, steps_, rates, anew in run_ranks(resumed, ranks, str(tmp_path), 2):
        assert path == str(tmp_path / "global_step3") and client == {"epoch": 3, 1: (2.5, None)} and same
        assert (micro, steps_, anew) == (6, 6, 0) and rates == [scripts.LR]
    assert (tmp_path / "latest").read_text() == "global_step3" and (tmp_path / "best").is_dir()
    for told in run_ranks(told_of_a_damaged_tag, ranks, str(tmp_path)):  # and no rank waits for the one that reads it
        assert "latest, which names the newest tag, is damaged; give tag=" in told


def test_a_checkpoint_in_parts(tmp_path: Path) -> None:
    torch_scheduled = scripts.config(1, 1, optimizer=scripts.CLASSIFIER["optimizer"])
    halving: Any = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    engine = made(torch_scheduled, lr_scheduler=halving)
    assert engine.load_checkpoint(tmp_path) == (None, None)
    steps(engine, 2)
    engine.save_checkpoint(tmp_path, tag="a")
    alone = made(torch_scheduled, lr_scheduler=halving)
    alone.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert alone.global_steps == 2 and alone.lr_scheduler.last_epoch == 0
    scheduled = made(torch_scheduled, lr_scheduler=halving)
    scheduled.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert scheduled.lr_scheduler.last_epoch == 2
    with pytest.raises(ConfigError, match="goes by the optimizer's updates; load both, or neither"):
        made().load_checkpoint(tmp_path, load_optimizer_states=False)
    with pytest.raises(ConfigError, match="use load_module_state_dict"):
        engine.load_checkpoint(tmp_path, custom_load_fn=print)
    with pytest.raises(ConfigError, match="holds all parameters"):
        engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    with pytest.raises(ConfigError, match="no name for a folder"):
        engine.save_checkpoint(tmp_path, tag="../b")


@pytest.mark.parametrize("head", ["other", None])
def test_weights_of_the_same_name_are_loaded_into_another_model(head: str | None, tmp_path: Path) -> None:
    def with_head(name: str | None, seed: int = 4) -> Any:
        model = nn.Sequential()
        model.add_module("body", scripts.net(seed, 3))
        if name is not None:
            model.add_module(name, nn.Linear(3, 1))
        return deepspeed.initialize(model=model, config=CONFIG)[0]

    saved = with_head("head", 3)
    saved.save_checkpoint(tmp_path)
    want = {name: value for name, value in saved.module_state_dict().items() if name.startswith("body")}
    parts: list[dict[str, Any]] = [{"load_module_only": True}, {}]
    for options in (*parts, {"load_module_strict": False}):
        with pytest.raises(CheckpointError, match=r"(?s)head.*load_module_only=True, load_module_strict=False"):
            with_head(head).load_checkpoint(tmp_path, **options)
    for options in (parts[0], {"load_optimizer_states": False, "load_lr_scheduler_states": False}):
        again = with_head(head)
        before = again.module_state_dict()
        again.load_checkpoint(tmp_path, load_module_strict=False, **options)
        found = again.module_state_dict()
        assert len(want) == 4 and all(torch.equal(found[name], value) for name, value in want.items())
        assert all(torch.equal(found[name], before[name]) for name in found.keys() - want.keys())


def test_weights_are_written_as_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = made()
    engine.save_16bit_model(tmp_path, "pytorch_model.bin")
    assert "would be a pickle" in capsys.readouterr().out
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == engine.module_state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in engine.module_state_dict().items())


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("corrects", [True, False])
def test_adam_is_the_formula(decoupled: bool, corrects: bool) -> None:
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(5, dtype=torch.float64))
    by_hand, m, v = weight.detach().clone(), torch.zeros(5).double(), torch.zeros(5).double()
    one = FusedAdam([weight], lr=0.1, bias_correction=corrects, adam_w_mode=decoupled, weight_decay=0.3)
    for t in range(1, 4):
        gradient = torch.randn(5, dtype=torch.float64)
        weight.grad = gradient.clone()
        one.step()
        g = gradient if decoupled else gradient + 0.3 * by_hand
        by_hand = by_hand * (1 - 0.1 * 0.3) if decoupled else by_hand
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        c1, c2 = (1 - 0.9**t, 1 - 0.999**t) if corrects else (1.0, 1.0)
        by_hand = by_hand - 0.1 * (m / c1) / ((v / c2).sqrt() + 1e-8)
        assert torch.allclose(weight.detach(), by_hand, atol=1e-13)
    assert DeepSpeedCPUAdam([weight]).param_groups[0]["adam_w_mode"] is True
    group = DeepSpeedCPUAdam([weight], 0.1, False, (0.5, 0.6), 1e-3, 0.3, False, False).param_groups[0]
    assert {key: value for key, value in group.items() if key != "params"} == {
        "lr": 0.1,
        "bias_correction": False,
        "betas": (0.5, 0.6),
        "eps": 1e-3,
        "weight_decay": 0.3,
        "adam_w_mode": False,
    }
    with pytest.raises(ValueError, match=r"use torch\.optim\.AdamW\(amsgrad=True\)"):
        FusedAdam([weight], amsgrad=True)


def adam_engines() -> list[dict[str, Any]]:
    """FusedAdam without bias correction over an engine's flat shards, and on one process."""
    found = []
    for stage in (0, 2, 3):
        model = scripts.net(1, 3).double()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=lambda p: FusedAdam(p, lr=0.1, bias_correction=False),
            config=scripts.config(stage, gradient_clipping=0.0),
        )
        for i in range(3):
            engine.backward(engine(torch.full((2, 6), 0.1 * i, dtype=torch.float64)).square().mean())
            engine.step()
        found.append({name: value.tolist() for name, value in engine.module_state_dict().items()})
    return found


def test_an_engine_runs_adam_without_bias_correction() -> None:
    plain = scripts.net(1, 3).double()
    adam = FusedAdam(plain.parameters(), lr=0.1, bias_correction=False)
    for i in range(3):
        adam.zero_grad()
        plain(torch.full((2, 6), 0.1 * i, dtype=torch.float64)).square().mean().backward()
        adam.step()
    for found in run_ranks(adam_engines, 2):
        for weights in found:
            for name, value in plain.state_dict().items():
                assert torch.allclose(torch.tensor(weights[name], dtype=torch.float64), value, atol=1e-11), name


def test_leaf_modules_are_units(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)), nn.Linear(6, 1))
    assert deepspeed.utils.set_z3_leaf_modules(model, [nn.Sequential])[1] is model[0]
    assert deepspeed.utils.get_z3_leaf_modules(model) == [model, model[0]]
    config = scripts.config(3, optimizer=scripts.CLASSIFIER["optimizer"])
    given = []
    initialize = megatron_ds.initialize

    def noting(*arguments: Any, **keywords: Any) -> Any:
        given.extend(keywords["unit_classes"])
        return initialize(*arguments, **keywords)

    monkeypatch.setattr(megatron_ds, "initialize", noting)
    deepspeed.initialize(model=model, config=config)
    assert given == [nn.Sequential]
    with pytest.raises(ConfigError, match=r"no module of the model is one of \['Experts'\]; it has Linear, Sequential"):
        deepspeed.utils.set_z3_leaf_modules(model, ["Experts"])


def test_a_model_without_an_optimizer_is_run_and_not_trained() -> None:
    engine, optimizer, loader, scheduler = deepspeed.initialize(model=Model(), config=scripts.config(0))
    assert optimizer is None and loader is None and scheduler is None
    with torch.no_grad():
        assert engine(torch.ones(2, 6)).dim() == 0
    with pytest.raises(EngineError, match=r"no optimizer; give deepspeed\.initialize\(\) optimizer="):
        engine.backward(engine(torch.ones(2, 6)))


def test_what_the_script_gives_is_preferred(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 1, 0.5)
    engine, _, _, scheduler = deepspeed.initialize(
        model=model, optimizer=sgd, lr_scheduler=schedule, config_params=CONFIG
    )
    said = capsys.readouterr().out
    assert "optimizer: not in use" in said and "scheduler: not in use" in said
    steps(engine, 2)
    assert scheduler is schedule and engine.get_lr() == [0.25]


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"config": CONFIG, "config_params": CONFIG}, "was given 2 configurations; give one"),
    ({"args": argparse.Namespace()}, "was given 0 configurations"),
    ({"config": CONFIG, "mpu": object()}, r"use megatron_ds\.initialize\(mesh=\)"),
    ({"config": CONFIG, "model": None}, "needs model="),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_arguments_without_a_counterpart_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed.initialize(**{"model": Model(), **arguments})


def test_more_errors_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="start the script with torchrun"):
        deepspeed.init_distributed(init_method="tcp://localhost:1")
    engine = made()
    with pytest.raises(EngineError, match=r"remove lr_scheduler\.step\(\)"):
        engine.lr_scheduler.step()
    with pytest.raises(EngineError, match=r"engine\.load_checkpoint\(\) sets it"):
        engine.lr_scheduler.load_state_dict({})
    with pytest.raises(ConfigError, match="a closure cannot be evaluated again"):
        engine.optimizer.step(lambda: 1)
    engine.backward(engine(torch.ones(2, 6)))
    engine.zero_grad()
    engine.step()  # of a micro-batch that is left out
    steps(engine, 1)
    assert engine.global_steps == 1 and engine.engine.last.targets == 1
    torch.optim.lr_scheduler.StepLR(engine.optimizer, 1)
    with pytest.raises(ConfigError, match="the script has made a torch scheduler of the same optimizer"):
        steps(engine)
    unsized, *_ = deepspeed.initialize(model=Model(), config={"optimizer": {"type": "AdamW"}})
    with pytest.raises(ConfigError, match="the configuration has no train_batch_size"):
        unsized.train_batch_size()


def different_tags(folder: str) -> str:
    try:
        made().save_checkpoint(folder, tag=f"rank{dist.get_rank()}")
    except CheckpointError as error:
        return str(error)
    return ""


def test_ranks_that_save_different_tags_are_told(tmp_path: Path) -> None:
    for said in run_ranks(different_tags, 2, str(tmp_path)):
        assert said.startswith('the ranks save different tags, "rank0", "rank1"')


def test_tied_layers_and_recomputed_ones() -> None:
    tied, spec = deepspeed.pipe.TiedLayerSpec, deepspeed.pipe.LayerSpec
    back: Any = lambda module, hidden: hidden @ module.weight  # noqa: E731
    model = deepspeed.PipelineModule(
        [tied("e", nn.Linear, 6, 4), torch.tanh, spec(nn.Linear, 4, 4), tied("e", nn.Linear, 6, 4, forward_fn=back)],
        num_stages=1,
        loss_fn=nn.functional.mse_loss,
        activation_checkpoint_interval=2,
    )
    assert len(list(model.parameters())) == 4
    batch = torch.randn(3, 6, requires_grad=True)
    want = torch.tanh(model.tied_modules["e"](batch))
    want = model.get_submodule("2")(want) @ model.tied_modules["e"].weight
    model.train()
    assert torch.equal(model(batch), want)
    config = scripts.config(2, 1, optimizer=scripts.CLASSIFIER["optimizer"])
    engine = deepspeed.initialize(model=model, config=config)[0]
    pairs = iter([(batch.detach(), batch.detach())] * 3)
    before = engine.eval_batch(pairs).item()
    assert before == pytest.approx(nn.functional.mse_loss(want, batch).item())
    assert engine.train_batch(pairs).item() == pytest.approx(before) and engine.eval_batch(pairs).item() < before
    with pytest.raises(EngineError, match="takes training_data, which initialize"):
        engine.train_batch()


def test_a_pipelines_own_data_comes_in_its_order() -> None:
    """Where other engines shuffle it."""
    model = deepspeed.PipelineModule([nn.Linear(6, 3)], num_stages=1, loss_fn=nn.functional.cross_entropy)
    config = scripts.config(0, 1, optimizer=scripts.CLASSIFIER["optimizer"])
    rows = torch.utils.data.TensorDataset(*scripts.data())
    for module, ordered in ((model, True), (scripts.net(1, 3), False)):
        loader = deepspeed.initialize(model=module, config=config, training_data=rows)[2]
        labels = torch.cat([label for _, label in loader])
        assert torch.equal(labels, scripts.data()[1]) is ordered and len(labels) == scripts.SAMPLES
    endless = deepspeed.utils.RepeatingLoader([1, 2])
    assert [next(endless) for _ in range(5)] == [1, 2, 1, 2, 1] and iter(endless) is endless


def test_activation_checkpointing_is_torchs() -> None:
    calls = []

    def body(value: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return value.square()

    deepspeed.checkpointing.configure(None, partition_activations=True)
    assert deepspeed.checkpointing.is_configured()
    value = torch.ones(2, requires_grad=True)
    deepspeed.checkpointing.checkpoint(body, value).sum().backward()
    deepspeed.checkpointing.reset()
    assert len(calls) == 2 and value.grad is not None and value.grad.tolist() == [2.0, 2.0]


def test_hugging_faces_configuration_object(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}')
    config = deepspeed.HfDeepSpeedConfig(tmp_path / "ds.json")
    assert config.is_zero3() and not config.is_zero2() and config.is_offload()
    assert config.get_value("zero_optimization.stage") == 3 and config.get_value("a.b", 7) == 7
    assert config.is_true("zero_optimization.stage") and not config.is_false("zero_optimization.stage")
    assert deepspeed.is_deepspeed_zero3_enabled()
    del config
    assert not deepspeed.is_deepspeed_zero3_enabled()


ALONE = """
from megatron_ds.integrations import deepspeed
deepspeed.init_distributed(dist_backend="gloo")
deepspeed.init_distributed()
deepspeed.comm.barrier(deepspeed.comm.get_world_group())
print(deepspeed.comm.get_rank(), deepspeed.comm.get_world_size(), deepspeed.comm.get_local_rank())
deepspeed.utils.logger.setLevel("INFO")
deepspeed.utils.log_dist("hello", [0])
deepspeed.utils.log_dist("nobody", [3])
"""


def test_a_script_alone_has_a_process_group() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.split() == ["0", "1", "0"], done.stderr
