"""Sampling: every scheduler finds the image that a perfect model knows, and every mesh draws the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dit_checkpoints import configuration, write_checkpoint
from torch import Tensor

from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models import objectives
from megatron_ds.models.samplers import Sampler, make_scheduler, run_of_checkpoint, save_grid, told_faults
from megatron_ds.testing import device_of_rank, run_ranks

COSINE = {"prediction": "v", "schedule": "cosine"}
Drawn = tuple[dict[str, Any], str, dict[str, Any]]
"""An objective, a scheduler and settings of the model."""
FLOW = {"prediction": "flow", "schedule": "flow", "shift": 3.0}


def perfect(run: DiffusionRun, known: Tensor) -> Any:
    """What a model predicts that was trained on one image alone, by the objective's own formulas."""

    def predict(images: Tensor, time: Tensor, told: Any) -> Tensor:
        share = time.double() / 1000
        if not run.objective.is_flow:
            share = (time.double() + 0.5) / 1000  # Euler's times lie between the steps
        else:  # noise_levels shifts what it is given
            share = share / (3 - 2 * share)
        levels = objectives.noise_levels(run.objective, share.clamp(1e-9, 1 - 1e-9), tokens=16)
        sigma = levels.sigma.clamp(min=1e-6).view(-1, 1, 1, 1)
        noise = (images.double() - levels.alpha.view(-1, 1, 1, 1) * known) / sigma
        return objectives.target(run.objective, levels, known.expand_as(noise), noise).float()

    return predict


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        ({}, ("ddpm", "ddim", "euler", "dpm++")),
        (COSINE, ("ddpm", "ddim", "euler", "dpm++")),
        ({"prediction": "x0"}, ("ddim", "euler")),
        (FLOW, ("flow", "dpm++")),
    ],
    ids=["epsilon", "v", "x0", "flow"],
)
def test_every_scheduler_finds_the_image_that_a_perfect_model_knows(
    objective: dict[str, Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    run = configuration(objective)
    write_checkpoint(tmp_path, run)
    sampler = Sampler(run, tmp_path, "param", Mesh.single())
    known = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    sampler.predict = perfect(run, known)  # type: ignore[method-assign]
    for name in names:
        drawn = sampler.sample([0, 1], name, 25, seed=3)
        assert (drawn - known).abs().max() < 0.05, name


@pytest.mark.parametrize("steps", [7, 60])
@pytest.mark.parametrize("objective", [{}, {**COSINE, "num_timesteps": 100}, {"prediction": "x0"}])
def test_ddim_is_euler_where_steps_do_not_divide_the_times(
    objective: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    """DDIM is Euler's method in sigma / alpha (Song et al. 2021, eq. 13), whatever the times."""
    run = configuration(objective)
    write_checkpoint(tmp_path, run)
    sampler = Sampler(run, tmp_path, "param", Mesh.single())

    def predict(images: Tensor, time: Tensor, told: Any) -> Tensor:
        """What is known of images whose pixels have the mean 0.3 and the standard deviation 0.5."""
        share = (time.double() + 0.5) / run.objective.num_timesteps
        levels = objectives.noise_levels(run.objective, share, tokens=16)
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in (levels.alpha, levels.sigma))
        known = 0.3 + alpha / 4 * (images.double() - 0.3 * alpha) / (alpha**2 / 4 + sigma**2)
        noise = (images.double() - alpha * known) / sigma
        return objectives.target(run.objective, levels, known, noise).float()

    sampler.predict = predict  # type: ignore[method-assign]
    drawn, wanted = (sampler.sample([0, 1], name, steps, seed=3) for name in ("ddim", "euler"))
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["euler", "ddpm"])
def test_an_image_follows_from_the_seed_and_its_number_alone(scheduler: str, tmp_path: Path) -> None:
    """Of one class: what a scheduler adds on the way is each image's own, too."""
    run = configuration({})
    write_checkpoint(tmp_path, run)
    sampler = Sampler(run, tmp_path, "param", Mesh.single())
    drawn = sampler.sample([1] * 3, scheduler, 3, seed=7)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (drawn[one] - drawn[other]).abs().max() > 0.1
    torch.testing.assert_close(sampler.sample([1] * 3, scheduler, 3, seed=7, batch=1), drawn, rtol=0, atol=1e-3)
    torch.testing.assert_close(sampler.sample([1] * 2, scheduler, 3, seed=7), drawn[:2], rtol=0, atol=1e-3)
    assert (sampler.sample([1], scheduler, 3, seed=8) - drawn[:1]).abs().max() > 0.1


TEXT = {"condition": "text", "num_classes": 1000, "text_size": 6, "text_tokens": 5, "pooled_size": 5}


def wanted(run: DiffusionRun) -> Any:
    if not run.model.has_text:
        return [1, 2, 1000]
    generator = torch.Generator().manual_seed(1)
    shapes = {"text": (3, 5, 6), "pooled": (3, 5), "empty.text": (1, 5, 6)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def draw_on(folder: str, objectives: list[Drawn], meshes: list[tuple[int, int]]) -> list[Any]:
    """Inside a job, on several meshes."""
    place, world = device_of_rank(dist.get_rank(), dist.get_world_size()), dist.get_world_size()
    return [draw(folder, objectives, Mesh.create(MeshShape.for_world(world, tp=tp, pp=pp), place)) for tp, pp in meshes]


def draw(folder: str, objectives: list[Drawn], mesh: Mesh) -> list[Tensor]:
    drawn = []
    for number, (objective, scheduler, model) in enumerate(objectives):
        meta = {"config": configuration(objective, **model).to_dict()}
        run = run_of_checkpoint(meta, "test", mesh.tp.size, mesh.pp.size, mesh.world.size)
        sampler = Sampler(run, f"{folder}/{number}", "ema", mesh)
        drawn.append(sampler.sample(wanted(run), scheduler, 2, guidance=2.0, seed=7, batch=2, size=(6, 10)))
    return drawn


def test_every_mesh_draws_the_same_images(tmp_path: Path) -> None:
    """Of 15 patches, and of texts of 5 tokens, which two ranks could not share."""
    objectives: list[Drawn] = [({}, "ddpm", {}), (COSINE, "euler", {}), (FLOW, "flow", TEXT)]
    objectives.append(({}, "ddpm", {"learned_variance": True}))
    for number, (objective, _, model) in enumerate(objectives):
        write_checkpoint(tmp_path / str(number), configuration(objective, **model))
    alone = draw(str(tmp_path), objectives, Mesh.single())
    ranks = run_ranks(draw_on, 4, str(tmp_path), objectives, [(2, 2), (1, 2)])
    for drawn in (mesh for rank in ranks for mesh in rank):
        for one, other in zip(alone, drawn):
            assert one.shape == (3, 1, 6, 10) and one.std() > 0.1
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
            assert (one[0] - one[1]).abs().max() > 0.1


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    run = configuration()
    write_checkpoint(tmp_path, run)
    sampler = Sampler(run, tmp_path, "param", Mesh.single())
    with pytest.raises(ConfigError, match=r"class 1001 is none of the model's, 0 to 999, or 1000 for none"):
        sampler.sample([0, 1001], "ddim", 1)
    for steps in (0, 1001):
        with pytest.raises(ConfigError, match=rf"{steps} steps .*: use 1 to objective\.num_timesteps=1000"):
            sampler.sample([0], "dpm++", steps)
    with pytest.raises(ConfigError, match=r"no scheduler 'flow' for objective\.schedule='linear'; use one of 'ddpm'"):
        make_scheduler(run.objective, "flow")
    with pytest.raises(ConfigError, match=r"use one of 'dpm\+\+', 'flow'"):
        make_scheduler(configuration(FLOW).objective, "ddim")
    with pytest.raises(ConfigError, match="does not hold a diffusion transformer"):
        run_of_checkpoint({"config": {"model": {"family": "gpt"}}}, "x", 1, 1, 1)
    with pytest.raises(ConfigError, match=r"model\.num_heads=2 cannot be split over mesh\.tp=4"):
        run_of_checkpoint({"config": run.to_dict()}, "x", 4, 1, 4)
    with pytest.raises(ConfigError, match=r"pp=3 stages for model\.num_layers=2"):
        run_of_checkpoint({"config": run.to_dict()}, "x", 1, 3, 3)
    with pytest.raises(ConfigError, match=r"images of 8 x 7: 7 is not a multiple of model\.patch_size=2"):
        sampler.sample([0], "ddim", 1, size=(8, 7))
    with pytest.raises(ConfigError, match="the model is told classes and no texts; use --classes"):
        sampler.sample({"text": torch.zeros(1, 2, 3)}, "ddim", 1)
    told = run.model.model_copy(update={"condition": "text", "text_size": 6, "pooled_size": 5})
    good = {"text": torch.zeros(2, 5, 6), "pooled": torch.zeros(2, 5)}
    for wrong, message in (
        ([1], "told texts and no classes; give them with --text, or their embeddings"),
        ({"text": good["text"]}, "there is no 'pooled' among the embeddings: 'text'"),
        ({**good, "pooled": torch.zeros(2, 6)}, "'pooled' has the shape [2, 6], and the model takes [2, 5]"),
    ):
        assert message in next(told_faults(told, wrong))
    assert not list(told_faults(told, good))
    with pytest.raises(ConfigError, match="images of 4 channels cannot be shown"):
        save_grid(torch.zeros(1, 4, 8, 8), 1, tmp_path / "x.png")


def test_the_grid_has_each_image_in_its_place(tmp_path: Path) -> None:
    from matplotlib import image

    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(-1, 1, 8, 8)
    save_grid(images, 3, tmp_path / "grid.png")
    shown = image.imread(tmp_path / "grid.png")
    assert shown.shape[:2] == (2 * 50, 3 * 50)
    found = [shown[50 * (i // 3) + 25, 50 * (i % 3) + 25, 0] for i in range(5)]
    assert found == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.01)
    assert shown[0, :, 0] == pytest.approx(0.5, abs=0.01)  # the line between
