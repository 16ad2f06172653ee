"""A diffusion transformer on one process against the one of `diffusers`, in float64: predictions, losses, gradients."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor

from megatron_ds.config import from_dict, validate
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.data.loader import to_tensors
from megatron_ds.errors import ConfigError
from megatron_ds.kernels.cpu.compiled_modulation import CompiledModulation
from megatron_ds.layers.mlp import MLP
from megatron_ds.layers.modulation import Modulation
from megatron_ds.mesh import Mesh
from megatron_ds.models import dit
from megatron_ds.models.conditions import time_sines
from megatron_ds.models.dit import DiT
from megatron_ds.models.dit_task import DiTTask
from megatron_ds.models.patches import sine_positions
from megatron_ds.pipeline.stage import StageSpan

LAYERS, HIDDEN, HEADS, CLASSES = 2, 24, 3, 10


def configuration(**objective: Any) -> DiffusionRun:
    model = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "image_size": 8,
        "channels": 3,
        "num_classes": CLASSES,
        "norm_eps": 1e-5,  # the default of `diffusers`
        "zero_init_std": 0.2,
    }
    return from_dict(DiffusionRun, {"model": model, "objective": {"condition_dropout": 0.3, **objective}}, "test")


def built(config: DiffusionRun) -> DiT:
    mesh = Mesh.single()
    model = DiTTask(config).make_stage(StageSpan(0, LAYERS), mesh, mesh.device, torch.float64)
    model.initialize(7)
    return model


def theirs(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names and in the shapes of `diffusers`; each of its blocks has embeddings of its own."""
    state = {"pos_embed.proj.weight": ours["patches.weight"].view(HIDDEN, 3, 2, 2)}
    names = {"patches.bias": "pos_embed.proj.bias"}
    for kind in ("weight", "bias"):
        names[f"final.{kind}"] = f"proj_out_2.{kind}"
        state[f"proj_out_1.{kind}"] = ours[f"final_modulation.{kind}"].flatten(0, 1)
        for i in range(LAYERS):
            a, b = f"layers.{i}", f"transformer_blocks.{i}"
            for number, name in enumerate(("to_q", "to_k", "to_v")):
                state[f"{b}.attn1.{name}.{kind}"] = ours[f"{a}.attention.qkv.{kind}"][:, number].flatten(0, 1)
            state[f"{b}.norm1.linear.{kind}"] = ours[f"{a}.modulation.{kind}"].flatten(0, 1)
            names[f"{a}.attention.out.{kind}"] = f"{b}.attn1.to_out.0.{kind}"
            names[f"{a}.mlp.up.{kind}"] = f"{b}.ff.net.0.proj.{kind}"
            names[f"{a}.mlp.down.{kind}"] = f"{b}.ff.net.2.{kind}"
            for own, name in (("time_in", "linear_1"), ("time_out", "linear_2")):
                state[f"{b}.norm1.emb.timestep_embedder.{name}.{kind}"] = ours[f"condition.{own}.{kind}"]
            state[f"{b}.norm1.emb.class_embedder.embedding_table.weight"] = ours["condition.classes.weight"]
    return state | {name: ours[own] for own, name in names.items()}


def diffusers_model(ours: dict[str, Tensor]) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HIDDEN // HEADS,
        in_channels=3,
        num_layers=LAYERS,
        sample_size=8,
        num_embeds_ada_norm=CLASSES,
    )
    model.load_state_dict(theirs(ours))
    return model.double().eval()  # in training it would drop classes itself


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"prediction": "v", "schedule": "cosine", "min_snr": 5.0},
        {"prediction": "flow", "schedule": "flow", "density": "logit_normal", "shift": 3.0},
    ],
    ids=["epsilon", "v", "flow, adaLN by graphs"],
)
def test_the_loss_and_every_gradient_are_those_of_diffusers(
    objective: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(**objective)
    model = built(config)
    if objective.get("prediction") == "flow":
        monkeypatch.setattr(dit, "CompiledModulation", partial(CompiledModulation, compiled=False))
        monkeypatch.setattr(MLP, "compile_activation", lambda self: None)
        model.compile_blocks()
        assert all(module.compiled for module in model.modules() if isinstance(module, Modulation))
    samples = DiTTask(config).open_sources().train
    batch = to_tensors(samples.batch(range(6)), samples.batch(range(6))["labels"])
    batch["counts"][2] = False
    ours = dict(model.named_parameters())
    other = diffusers_model({name: p.detach() for name, p in ours.items()})
    loss = model(batch)
    loss.backward()

    image, noise, u = batch["images"].double(), batch["noise"].double(), batch["time"]
    weight = torch.ones(6, dtype=torch.float64)
    if not objective:
        time = (u * 1000).floor()
        kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[time.long()].view(-1, 1, 1, 1)
        noisy, target = kept.sqrt() * image + (1 - kept).sqrt() * noise, noise
    elif objective["prediction"] == "v":
        time = (u * 1000).floor()
        curve = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
        kept = (1 - (1 - curve[1:] / curve[:-1]).clamp(max=0.999)).cumprod(0)[time.long()]
        snr = kept / (1 - kept)
        weight = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
        kept = kept.view(-1, 1, 1, 1)
        noisy, target = kept.sqrt() * image + (1 - kept).sqrt() * noise, kept.sqrt() * noise - (1 - kept).sqrt() * image
    else:
        s = 1 / (1 + (-torch.special.ndtri(u)).exp())
        s = 3 * s / (1 + 2 * s)
        time, at = 1000 * s, s.view(-1, 1, 1, 1)
        noisy, target = (1 - at) * image + at * noise, noise - image
    predicted = other(noisy, timestep=time, class_labels=batch["labels"]).sample
    errors = (predicted - target).square().sum((1, 2, 3)) * weight * batch["counts"]
    errors.sum().backward()
    assert loss.item() == pytest.approx(errors.sum().item(), rel=1e-10)
    assert DiTTask(config).count([batch]).item() == 5 * 3 * 8 * 8

    gradients = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    mine = theirs({name: p.grad for name, p in ours.items() if p.grad is not None})
    assert mine.keys() == dict(other.named_parameters()).keys()
    for name, gradient in mine.items():
        if ".emb." in name:  # ours is one for all blocks
            if not name.startswith("transformer_blocks.0."):
                continue
            gradient_of = [gradients[name.replace("blocks.0", f"blocks.{i}")] for i in range(LAYERS)]
            want = torch.stack(gradient_of).sum(0)
        else:
            want = gradients[name]
        assert want.abs().max() > 0
        torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-9, msg=name)


def test_predictions_are_those_of_diffusers() -> None:
    model = built(configuration())
    other = diffusers_model({name: p.detach() for name, p in model.named_parameters()})
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=generator)
    times, labels = torch.tensor([0.0, 999, 3, 500, 257]), torch.tensor([0, CLASSES, 3, 9, 1])
    with torch.no_grad():
        got = model.predict({"images": images, "time": times, "labels": labels})
        want = other(images, timestep=times, class_labels=labels).sample
    assert got.abs().max() > 0.5
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_wide_image_is_seen_as_by_diffusers() -> None:
    """Its model puts the patches together as a square one, so that what its last layer gives is compared."""
    model = built(configuration())
    other = diffusers_model({name: p.detach() for name, p in model.named_parameters()})
    images, time, labels = torch.randn(2, 3, 4, 16, dtype=torch.float64), torch.tensor([7.0, 900]), torch.tensor([1, 2])
    found: list[Tensor] = []
    other.proj_out_2.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        got = model.predict({"images": images, "time": time, "labels": labels})
        other(images, timestep=time, class_labels=labels)
    want = torch.einsum("bhwpqc->bchpwq", found[0].view(2, 2, 8, 2, 2, 3)).reshape(2, 3, 4, 16)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("grid", "base", "largest"), [((4, 4), 4, None), ((2, 8), 4, None), ((3, 6), 4, 9)])
def test_positions_have_the_bits_of_diffusers(grid: tuple[int, int], base: int, largest: int | None) -> None:
    theirs = PatchEmbed(base, base, patch_size=1, in_channels=1, embed_dim=24, pos_embed_max_size=largest, bias=False)
    torch.nn.init.zeros_(theirs.proj.weight)
    assert torch.equal(sine_positions(24, grid, base, largest), theirs(torch.zeros(1, 1, *grid))[0])


def test_a_new_model_predicts_nothing_and_its_blocks_do_nothing() -> None:
    values = configuration().to_dict()
    values["model"]["zero_init_std"] = 0.0
    model = built(from_dict(DiffusionRun, values, "test"))
    seen = {"images": torch.ones(1, 3, 8, 8), "time": torch.ones(1), "labels": torch.zeros(1, dtype=torch.long)}
    assert model.predict(seen).abs().max() == 0
    x = torch.randn(16, 2, HIDDEN, dtype=torch.float64)
    block = model.layers["0"]
    condition = torch.randn(2, HIDDEN, dtype=torch.float64)
    assert torch.equal(block(condition, model._inputs(seen, x.dtype), x)[0], x)


@pytest.mark.parametrize("condition", ["class", "text"])
def test_initial_weights_are_as_wide_as_the_papers_say(condition: str) -> None:
    """Xavier's standard deviation around the blocks and for square weights in them; 0.02 of times and classes; zeros of
    what adaLN-Zero starts with (Peebles and Xie 2023, section 3)."""
    values = configuration().to_dict()
    values["model"] |= {"zero_init_std": 0.0, "hidden_size": 128, "num_heads": 4, "patch_size": 4, "num_classes": 300}
    values["model"] |= {"text_size": 96, "text_tokens": 4, "pooled_size": 64} if condition == "text" else {}
    values["model"]["condition"] = condition
    if condition == "text":
        values["objective"]["condition_dropout"] = 0.0
    for name, parameter in built(from_dict(DiffusionRun, values, "test")).named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        if not matrix or "modulation" in name or name.startswith("final"):
            assert (parameter == float("norm" in name and name.endswith("weight"))).all(), name
            continue
        outside = 0.02 if ".time_" in name or ".classes" in name else math.sqrt(2 / sum(parameter.shape))
        want = 128**-0.5 if name.startswith("layers.") else outside
        assert parameter.std().item() == pytest.approx(want, rel=0.05), name


def test_times_stay_apart_in_half_precision() -> None:
    """In bf16 itself 257 would be 256, and 1000 times some 200."""
    mesh = Mesh.single()
    model = DiTTask(configuration()).make_stage(StageSpan(0, LAYERS), mesh, mesh.device, torch.bfloat16)
    model.initialize(7)
    sines = time_sines(torch.arange(1000, dtype=torch.float64))
    assert sines.dtype == torch.float32 and len(sines.unique(dim=0)) == 1000
    with torch.no_grad():
        found = model.condition.of_time(torch.arange(1000, dtype=torch.float64))
    assert found.dtype == torch.bfloat16 and len(found.unique(dim=0)) > 950


def test_padded_rows_of_an_evaluation_count_nothing() -> None:
    config = configuration()
    task, samples = DiTTask(config), DiTTask(config).open_sources().train
    batch = samples.rows([4, 0])
    task.leave_out(batch, torch.tensor([True, False]).numpy())
    model = built(config)
    tensors = to_tensors(batch, batch["labels"])
    alone = to_tensors(samples.rows([4]), batch["labels"][:1])
    assert task.count([tensors]) == task.count([alone]) == 3 * 8 * 8
    narrow = {**alone, "images": alone["images"][..., :4]}
    assert task.tokens(2, int(task.count([alone, narrow]))) == (8 * 8 + 8 * 4) / config.model.patch_size**2
    assert model(tensors).item() == pytest.approx(model(alone).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "world", "message"),
    [
        (
            {"model": {"patch_size": 3}},
            1,
            r"model\.image_size=32: 32 is not a multiple of .*; patch_size may be 1, 2, 4",
        ),
        ({"model": {"num_heads": 5}}, 1, r"model\.hidden_size=384 is not a multiple of model\.num_heads=5; use"),
        ({"model": {"hidden_size": 6, "num_heads": 1}}, 1, r"model\.hidden_size=6 is not a multiple of 4"),
        ({"mesh": {"tp": 4}}, 4, r"model\.num_heads=6 cannot be split over mesh\.tp=4; tp may be 1, 2, 3 or 6"),
        ({"mesh": {"tp": 2}, "model": {"ffn_hidden_size": 9}}, 2, r"model\.ffn_hidden_size=9 cannot be split"),
        ({"model": {"position_grid": 15}}, 1, r"16 patches along a side, more than model\.position_grid=15"),
        ({"mesh": {"tp": 3}}, 3, r"the 256 patches of an image .* cannot be split over mesh\.tp=3"),
        ({"objective": {"prediction": "flow"}}, 1, r"objective\.prediction='flow' with objective\.schedule='linear'"),
        ({"objective": {"schedule": "flow"}}, 1, r"use objective\.prediction='flow', or another of both"),
        ({"objective": {"beta_start": 0.1}}, 1, r"objective\.beta_start=0\.1 is not below objective\.beta_end=0\.02"),
        ({"objective": {"zero_terminal_snr": True}}, 1, r"of noise alone the noise says nothing .*; use 'v' or 'x0'"),
        ({"objective": {"vlb_weight": 0.5}}, 1, r"objective\.vlb_weight=0\.5 does nothing: .* model\.learned_variance"),
        (
            {"model": {"learned_variance": True}, "objective": {"prediction": "flow", "schedule": "flow"}},
            1,
            r"rectified flow have no variances",
        ),
        ({"objective": {"shift": 3.0}}, 1, r"objective\.shift=3\.0 does nothing: .* use 'flow'"),
        ({"objective": {"logit_std": 3.0}}, 1, r"objective\.logit_std=3\.0 does nothing"),
        ({"data": {"source": "digits"}}, 1, r"data\.source='digits' has images of 8 x 8 x 1"),
        (
            {"data": {"source": "digits"}, "model": {"image_size": 8, "channels": 1, "num_classes": 9}},
            1,
            r"model\.num_classes=9 is less than the 10",
        ),
        ({"mesh": {"cp": 2}}, 2, r"mesh\.cp=2: context parallelism is not built yet; use mesh\.cp=1"),
        ({"optimizer": {"ema_warmup": False}}, 1, r"optimizer\.ema_warmup=False does nothing"),
    ],
)
def test_what_does_not_fit_together_is_said_before_the_run(values: Any, world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(from_dict(DiffusionRun, values, "test"), world)
