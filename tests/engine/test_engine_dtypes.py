"""Parameters of other dtypes: complex ones as in plain torch, fp16 with a loss scale, others refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_more import message
from torch import Tensor, nn

import megatron_ds
from megatron_ds.engine import Engine
from megatron_ds.testing import run_ranks

STEPS = 3
STAGES = (0, 1, 2, 3)
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


class Spectral(nn.Module):
    """A layer in Fourier space, a complex scale that stays, and real layers around them."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inputs = nn.Linear(6, 8).double()
        self.modes = nn.Parameter(torch.randn(5, 5, dtype=torch.complex128) / 2)
        self.shift = nn.Parameter(torch.randn(5, dtype=torch.complex128), requires_grad=False)
        self.register_buffer("scale", torch.tensor([1 + 2j], dtype=torch.complex128))
        self.output = nn.Linear(8, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(torch.tanh(self.inputs(x))) @ self.modes * self.scale + self.shift
        return self.output(torch.fft.irfft(spectrum, 8)).square().mean()


def samples(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def engine_of(stage: int, optimizer: str) -> Engine:
    model = Spectral()
    zero = {"stage": stage, "bucket_mb": 0.0005, **({"persistence_threshold": 0} if stage == 3 else {})}
    config = {"zero": zero, "optimizer": {"clip_norm": 0.5}}
    return megatron_ds.initialize(
        model, config, OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    )


def trained(stage: int, optimizer: str, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    """Two steps, saved, and one more by another engine; and a gradient of the last step."""
    for part in (range(2), range(2, STEPS)):
        engine = engine_of(stage, optimizer)
        axis = engine.mesh.data
        if part.start:
            engine.module.scale.zero_()  # type: ignore[operator, union-attr]
            engine.load_checkpoint(folder)
        for step in part:
            engine.backward(engine(samples(step).chunk(axis.size)[axis.rank]))
            gradient = engine.get_gradient("modes")
            engine.step()
        if not part.start:
            engine.set_parameter("modes", engine.get_parameter("modes").conj())
            engine.set_parameter("modes", engine.get_parameter("modes").conj())
            engine.save_checkpoint(folder)
    state = engine.state_dict()
    engine.close()
    return state, gradient


def all_trained(folder: str) -> dict[Any, Any]:
    cases = [(stage, optimizer) for stage in STAGES for optimizer in OPTIMIZERS]
    return {case: trained(*case, f"{folder}/{case[0]}{case[1]}") for case in cases}


def test_complex_parameters_equal_plain_torch(tmp_path: Path) -> None:
    want = {}
    for name, make in OPTIMIZERS.items():
        model = Spectral()
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        for step in range(STEPS):
            optimizer.zero_grad()
            model(samples(step)).backward()
            assert model.modes.grad is not None
            gradient = model.modes.grad.clone()
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
        want[name] = model.state_dict(), gradient
    assert norm > 0.5
    for ranks in (1, 2):
        for found in run_ranks(all_trained, ranks, str(tmp_path / str(ranks))):
            for (stage, name), (state, gradient) in found.items():
                assert (gradient - want[name][1]).abs().max() < 1e-9, (stage, name)
                assert state.keys() == want[name][0].keys()
                for key, value in want[name][0].items():
                    assert state[key].dtype == value.dtype and (state[key] - value).abs().max() < 1e-9, (
                        stage,
                        name,
                        key,
                    )


ODD = (torch.int8, torch.int16, torch.uint16, torch.bool, torch.float8_e4m3fn)


class Quantised(nn.Module):
    """Frozen weights of other dtypes, which no two ranks begin with alike, beside trained ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        values = torch.randint(0, 4, (len(ODD), 8, 8))
        self.weights = nn.ParameterList(nn.Parameter(v.to(d), requires_grad=False) for v, d in zip(values, ODD))
        self.head = nn.Linear(8, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight.double())
        return self.head(x).square().mean()


def quantised(stage: int) -> list[Tensor]:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    blocks = nn.ModuleList([Quantised(rank), Quantised(10 + rank)])
    zero = {"stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})}
    engine = megatron_ds.initialize(blocks, {"zero": zero}, torch.optim.SGD(blocks.parameters(), lr=0.1))
    torch.stack([block(torch.ones(2, 8).double()) for block in blocks])  # also without an engine's forward
    engine.backward(torch.stack([block(torch.ones(2, 8).double()) for block in blocks]).sum())
    engine.step()
    state = engine.state_dict()
    engine.close()
    return [value.double() for value in state.values()]


@pytest.mark.parametrize("apart", [False, True])
def test_frozen_parameters_of_any_dtype_are_rank_0s(apart: bool) -> None:
    (want,) = run_ranks(quantised, 1, 0)
    for stage in (1, 3):
        for got in run_ranks(quantised, 2, stage, apart=apart):
            assert all((mine - value).abs().max() < 1e-9 for mine, value in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_dtypes_that_cannot_be_trained_are_named() -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(model.weight.detach().to(torch.float8_e4m3fn))
    said = message(megatron_ds.initialize, model)
    assert "weight is of dtype float8_e4m3fn" in said and "requires_grad_(False)" in said
    model.weight.requires_grad_(False)
    engine = megatron_ds.initialize(model)
    model.weight.requires_grad_(True)  # later, which is no better
    assert "weight is of dtype float8_e4m3fn" in message(engine.train_batch, [torch.ones(4)])
    engine.close()
    model.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex32))
    assert "make it complex64" in message(megatron_ds.initialize, model)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 3, 1))
        self.norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.net(x)).float().square().mean()


@pytest.mark.parametrize(("dtype", "stage"), [("bf16", 1), ("bf16", 3), ("fp16", 2), ("fp64", 0)])
def test_norms_with_running_statistics_are_computed_in_fp32_at_least(dtype: str, stage: int) -> None:
    """As in plain torch with the norms in fp32: with half-precision weights torch takes no running mean in fp32."""
    other = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[dtype]
    x = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(0)).to(other)
    plain = Normed().to(other)
    for norm in (plain.net[1], plain.norm) if dtype != "fp64" else ():
        norm.float()
    model = Normed()
    config = {"precision": {"dtype": dtype}, "zero": {"stage": stage}}
    engine = megatron_ds.initialize(model, config, torch.optim.SGD(model.parameters(), lr=0.1))
    loss, want = engine(x), plain(x)
    assert torch.equal(loss, want)
    engine.backward(loss)
    want.backward()
    engine.step()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    state = engine.state_dict()
    for key, value in plain.state_dict().items():
        assert state[key].dtype == value.dtype and torch.allclose(state[key], value, rtol=1e-2, atol=1e-3), key
    plain.load_state_dict(state)
    engine.eval()
    assert torch.equal(engine(x), plain.eval()(x))
    engine.close()


class Small(nn.Module):
    """Its gradient is ``size``, which fp16 cannot hold unless it is scaled."""

    def __init__(self, size: float):
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.zeros(8).half()), size

    def forward(self) -> Tensor:
        return (self.weight * 2**-10).float().sum() * (self.size * 2**10)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_in_fp16_has_its_loss_scaled(frozen: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Decided by the parameters that are trained; 2e-8 is below fp16's smallest number."""
    model = nn.ModuleDict({"small": Small(2e-8), "other": nn.Linear(1, 1)})
    model["small"].requires_grad_(not frozen)
    model.forward = lambda: model["small"]() + model["other"].weight.sum()  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    engine = megatron_ds.initialize(model, {"precision": {"initial_loss_scale": 2.0**12}}, optimizer)
    engine.backward(engine())
    # What a loop may look at is without the scale.
    for name, size in (("other.weight", 1.0), *([] if frozen else [("small.weight", 2e-8)])):
        gradient = engine.get_gradient(name).float()
        torch.testing.assert_close(gradient, torch.full_like(gradient, size), rtol=1e-3, atol=0)
    norm = engine.get_gradient_norm().item()
    result = engine.step()
    assert result is not None and not result.skipped
    assert norm == pytest.approx(1.0) == result.grad_norm
    assert result.loss_scale == (1.0 if frozen else 2.0**12)
    assert ("parameters are in fp16: the loss is scaled" in capsys.readouterr().out) == (not frozen)
    want = torch.full((8,), 0.0 if frozen else -2e-5)
    torch.testing.assert_close(engine.get_parameter("small.weight").float(), want, rtol=1e-3, atol=0)
    engine.close()


def test_a_loss_scale_without_fp16_is_named() -> None:
    config = {"precision": {"loss_scale": 8.0}}
    assert "no trained parameter of the model is" in message(megatron_ds.initialize, nn.Linear(2, 2), config)
    engine = megatron_ds.initialize(nn.Linear(2, 2).half(), config)
    assert engine.train_step.scaler.scale == 8.0
    engine.close()
