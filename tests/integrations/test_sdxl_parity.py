"""SDXL's UNet in an engine against a plain loop on one process, in float64: every parameter and its moving average."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sdxl_tiny import MadeUpLatents, tiny_unet
from torch import Tensor

import megatron_ds
from megatron_ds.config.diffusion import ObjectiveConfig
from megatron_ds.config.engine import EngineConfig
from megatron_ds.data import noise
from megatron_ds.data.image_samples import DiffusionSamples, LatentImages
from megatron_ds.data.loader import BatchLoader
from megatron_ds.engine.model_layout import layout_of
from megatron_ds.integrations.sdxl.training import identity_of, learning_rates
from megatron_ds.models.sdxl import CONDITION, denoising_loss, objective_of
from megatron_ds.optim.ema import AveragedUpdate
from megatron_ds.testing import run_ranks

STEPS, HALF, BATCH, ACCUMULATION, RANKS = 2, 1, 1, 2, 2
GAMMA, CLIP = 3.0, 0.3
EPS = 1e-4  # larger than rounding errors: some gradients are zero but for those
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
PREDICTIONS = ("epsilon", "v_prediction", "epsilon", "v_prediction")  # by stage


@dataclass
class Run:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    bytes: dict[str, int] = field(default_factory=dict)  # that an engine's rank holds


def samples() -> DiffusionSamples:
    images = LatentImages(MadeUpLatents(6), 3, CONDITION)  # type: ignore[arg-type]
    return DiffusionSamples(images, 3, no_class=0, dropout=0.4, block=BATCH, noise_offset=0.1)


def objective(prediction: str) -> ObjectiveConfig:
    return objective_of({**SCHEDULER, "prediction_type": "sample"}, prediction, GAMMA, 0.4)


def unet(checkpointing: bool = False) -> Any:
    model = tiny_unet().double().to(memory_format=torch.channels_last)
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def by_a_plain_loop(prediction: str) -> Run:
    """With the formulas of the training scripts of `diffusers`, and its EMAModel."""
    from diffusers.training_utils import EMAModel

    model, loader = unet(), BatchLoader(samples(), BATCH * ACCUMULATION * RANKS, BATCH, prefetch=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, eps=EPS, weight_decay=0.1)
    average = EMAModel(model.parameters(), decay=0.7)
    rate = learning_rates("cosine", 1e-2, 0, 2 * STEPS)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    found = Run([], [], {}, {})
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        losses = []
        for batch in next(loader):
            time = (batch["time"] * 1000).long()
            alpha, sigma = (value[time].view(-1, 1, 1, 1) for value in (kept.sqrt(), (1 - kept).sqrt()))
            latents, drawn = batch["images"].double(), batch["noise"].double()
            time_ids = torch.cat([batch["original_size"], batch["crop_top_left"], batch["target_size"]], 1)
            sizes = {"text_embeds": batch["pooled"].double(), "time_ids": time_ids}
            seen = alpha * latents + sigma * drawn
            out = model(seen, time, batch["text"].double(), added_cond_kwargs=sizes).sample
            snr = kept[time] / (1 - kept[time])
            clamped = torch.stack([snr, torch.full_like(snr, GAMMA)], 1).min(1).values
            epsilon = prediction == "epsilon"
            target, weight = (
                (drawn, clamped / snr) if epsilon else (alpha * drawn - sigma * latents, clamped / (snr + 1))
            )
            losses.append(((out - target).square().mean((1, 2, 3)) * weight).mean())
        loss = torch.stack(losses).mean()
        loss.backward()
        found.losses.append(loss.item())
        found.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        average.step(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    found.weights = {name: p.detach() for name, p in model.named_parameters()}
    found.averages = dict(zip(names, average.shadow_params))
    return found


def settings(stage: int) -> dict[str, Any]:
    return {
        "micro_batch": BATCH,
        "accumulation": ACCUMULATION,
        "decay": "all",
        "zero": {"stage": stage, "bucket_mb": 0.5},
        "optimizer": {"lr": 1.0, "weight_decay": 0.1, "beta2": 0.999, "eps": EPS, "clip_norm": CLIP, "ema_decay": 0.7},
        "precision": {"dtype": "fp64"},
    }


def engine_of(stage: int, prediction: str) -> Any:
    rate = learning_rates("cosine", 1e-2, 0, 2 * STEPS)
    loss = denoising_loss(objective(prediction), torch.float64)
    return megatron_ds.initialize(unet(checkpointing=True), settings(stage), lr_scheduler=rate, loss=loss)


def steps_of(engine: Any, loader: BatchLoader, last: int) -> Run:
    found = Run([], [], {}, {})
    while engine.steps < last:
        result = engine.train_batch(next(loader))
        found.losses.append(result.loss)
        found.norms.append(result.grad_norm)
    found.weights, found.averages = engine.state_dict(), engine.state_dict(average=True)
    found.bytes = engine.bytes_report()
    return found


def loader_of(engine: Any, consumed: int = 0) -> BatchLoader:
    replicas = engine.mesh.data
    return BatchLoader(samples(), engine.sizes.global_batch, BATCH, replicas.rank, replicas.size, consumed, prefetch=0)


def by_the_engine(stage: int, prediction: str, folder: str) -> tuple[Run, list[str]]:
    """A run, and what differs in one that goes on from its middle."""
    engine = engine_of(stage, prediction)
    loader = loader_of(engine)
    first = steps_of(engine, loader, HALF)
    engine.save_checkpoint(folder, loader.state_dict())
    second = steps_of(engine, loader, STEPS)
    engine.save_pretrained(f"{folder}-unet")
    engine.close()
    engine = engine_of(stage, prediction)
    resumed = steps_of(engine, loader_of(engine, **engine.load_checkpoint(folder)), STEPS)
    engine.close()
    differs = [name for name in ("losses", "norms") if getattr(second, name) != getattr(resumed, name)]
    differs += [name for name, value in second.weights.items() if not torch.equal(value, resumed.weights[name])]
    differs += [name for name, value in second.averages.items() if not torch.equal(value, resumed.averages[name])]
    second.losses[:0], second.norms[:0] = first.losses, first.norms
    return sent(second), differs


def sent(run: Run) -> Run:
    """Tensors are the same on all ranks, and take long to send."""
    return run if not dist.get_rank() else Run(run.losses, run.norms, {}, {}, run.bytes)


def same_on_all_ranks(*arguments: Any, **keywords: Any) -> Any:
    """Noise by the place in the micro-batch alone."""
    seed, purpose, indices, *rest = arguments
    return _NORMAL(seed, purpose, np.arange(len(indices)), *rest, **keywords)


_NORMAL = noise.normal


def without_average(self: Any, lr: float, scale: float = 1.0) -> None:
    self._update.step(lr, scale)
    self._count += 1


FAULTS = {
    "noise": lambda: mock.patch.object(noise, "normal", same_on_all_ranks),
    "average": lambda: mock.patch.object(AveragedUpdate, "step", without_average),
}
FAULTY_STAGE = 2


def every_stage(folder: str) -> tuple[list[tuple[Run, list[str]]], dict[str, Run]]:
    """Of each stage, and with each fault."""
    stages = [by_the_engine(stage, kind, f"{folder}/{stage}") for stage, kind in enumerate(PREDICTIONS)]
    faulty = {}
    for name, fault in FAULTS.items():
        with fault():
            engine = engine_of(FAULTY_STAGE, PREDICTIONS[FAULTY_STAGE])
            faulty[name] = sent(steps_of(engine, loader_of(engine), STEPS))
            engine.close()
    return stages, faulty


def distance(one: Run, other: Run) -> dict[str, float]:
    def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        assert a.keys() == b.keys()
        return float(torch.stack([(a[name] - b[name]).abs().max() for name in a]).max())  # NaN stays

    return {
        "losses": float(np.abs(np.subtract(one.losses, other.losses)).max()),
        "norms": float(np.abs(np.subtract(one.norms, other.norms)).max()),
        "weights": furthest(one.weights, other.weights),
        "averages": furthest(one.averages, other.averages),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sdxl")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[tuple[list[tuple[Run, list[str]]], dict[str, Run]]]:
    return run_ranks(every_stage, RANKS, str(folder))


@pytest.fixture(scope="module")
def wanted() -> dict[str, Run]:
    return {prediction: by_a_plain_loop(prediction) for prediction in set(PREDICTIONS)}


def test_every_stage_is_a_plain_loop_and_resumes_bitwise(ranks: Any, wanted: dict[str, Run]) -> None:
    initial = {name: value.detach() for name, value in unet().named_parameters()}
    for stage, ((run, differs), prediction) in enumerate(zip(ranks[0][0], PREDICTIONS)):
        assert not differs
        found = distance(run, wanted[prediction])
        assert all(value < 1e-9 for value in found.values()), (stage, found)
        moved = [float((value - initial[name]).abs().max()) for name, value in run.averages.items()]
        assert np.median(moved) > 1e-4
    for (run, _), (other, differs) in zip(ranks[0][0], ranks[1][0]):
        assert (run.losses, run.norms) == (other.losses, other.norms) and not differs


def test_the_bytes_of_a_rank_are_known_without_it(ranks: Any) -> None:
    model = unet()
    for stage in range(4):
        layout = layout_of(model, EngineConfig.model_validate(settings(stage)), RANKS)
        assert [rank[0][stage][0].bytes for rank in ranks] == [layout.bytes(ACCUMULATION).by_kind] * RANKS


def test_the_average_is_what_is_exported(ranks: Any, wanted: dict[str, Run], folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    for stage, prediction in enumerate(PREDICTIONS):
        saved = UNet2DConditionModel.from_pretrained(folder / f"{stage}-unet", torch_dtype=torch.float64)
        want = wanted[prediction]
        for name, value in saved.state_dict().items():
            assert (value - want.averages[name]).abs().max() < 1e-9
        assert max(float((want.averages[name] - value).abs().max()) for name, value in want.weights.items()) > 1e-4


def test_noise_equal_across_ranks_and_an_average_that_is_not_moved_are_noticed(
    ranks: Any, wanted: dict[str, Run]
) -> None:
    of_fault = {name: distance(run, wanted[PREDICTIONS[FAULTY_STAGE]]) for name, run in ranks[0][1].items()}
    assert of_fault["noise"]["losses"] > 1e-3
    assert of_fault["average"]["averages"] > 1e-4 and of_fault["average"]["weights"] < 1e-9


@pytest.mark.parametrize("lr", [1e-4, 3e-2])
@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_learning_rates_are_those_that_an_optimizer_gets_of_diffusers(name: str, lr: float) -> None:
    """Two updates longer than the schedule."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=8)
    rate = learning_rates(name, lr, 3, 8)
    for update in range(1, 11):
        assert rate(update) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=0), update
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("sizes", [1, 2])
def test_a_run_goes_on_with_another_batch_size_where_the_order_stays(sizes: int) -> None:
    cache = MadeUpLatents(8)
    cache.buckets = {(8, 8 * size): np.arange(8)[size - 1 :: sizes] for size in range(1, sizes + 1)}
    images: Any = LatentImages(cache, 3, CONDITION)  # type: ignore[arg-type]
    orders = [DiffusionSamples(images, 3, 0, 0.0, block).order.rows(np.arange(8)).tolist() for block in (1, 2)]
    known = [identity_of(objective("epsilon"), 3, cache, None, block) for block in (1, 2)]  # type: ignore[arg-type]
    assert (known[0] == known[1]) == (orders[0] == orders[1]) == (sizes == 1)


def test_sizes_and_times_stay_in_fp32() -> None:
    """In bf16 a side of 1023 pixels would be one of 1024."""
    called: dict[str, Any] = {}

    def spy(seen: Tensor, time: Tensor, text: Tensor, added_cond_kwargs: dict[str, Tensor]) -> Any:
        called.update(added_cond_kwargs, seen=seen, time=time, text=text)
        return mock.Mock(sample=torch.zeros_like(seen))

    (batch,) = next(BatchLoader(samples(), 2, 2, prefetch=0))
    batch["original_size"][0] = torch.tensor([1023, 767])
    loss = denoising_loss(objective("epsilon"), torch.bfloat16)(spy, batch)
    assert loss.dtype == torch.float32
    assert {called[name].dtype for name in ("seen", "text", "text_embeds")} == {torch.bfloat16}
    assert called["time_ids"].dtype == torch.float32
    assert called["time_ids"][0].tolist() == [1023, 767, *batch["crop_top_left"][0], *batch["target_size"][0]]
    assert called["time"].dtype == torch.float64


def test_a_sample_without_its_text_is_decided_by_its_place_in_the_run() -> None:
    mine = samples()
    batch = mine.batch(np.arange(200))
    dropped = (batch["text"] == 0.5).all((1, 2))
    assert 50 < dropped.sum() < 110 and np.array_equal(dropped, (batch["pooled"] == 0.5).all(1))
    again = mine.batch(np.arange(150, 160))
    assert all(np.array_equal(again[name], batch[name][150:160]) for name in batch)
    assert len(np.unique(batch["noise"][:, 0, 0, 0])) == len(np.unique(batch["time"])) == 200
    rows = mine.rows(np.arange(6))
    assert not (rows["text"] == 0.5).all((1, 2)).any(), "never in evaluation"
    offset = batch["noise"].mean((2, 3)).std()
    assert offset == pytest.approx((1 / 64 + 0.1**2) ** 0.5, rel=0.1)
