"""A transformer of joint text-image blocks against Stable Diffusion 3's of `diffusers`, in float64, and its costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.normalization import RMSNorm
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megatron_ds.config import from_dict, validate
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.convert.dit_tables import SD3
from megatron_ds.data.loader import to_tensors
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Mesh
from megatron_ds.models.dit import DiT
from megatron_ds.models.dit_task import DiTTask
from megatron_ds.pipeline.stage import StageSpan

TEXT = {"condition": "text", "text_size": 12, "text_tokens": 5, "pooled_size": 7}


def configuration(objective: dict[str, Any] | None = None, **model: Any) -> DiffusionRun:
    values = {
        "num_layers": 3,
        "hidden_size": 24,
        "num_heads": 3,
        "image_size": 8,
        "channels": 3,
        "zero_init_std": 0.2,
        **TEXT,
        **model,
    }
    flow = {"prediction": "flow", "schedule": "flow", "density": "logit_normal", "shift": 3.0}
    return from_dict(DiffusionRun, {"model": values, "objective": flow if objective is None else objective}, "test")


def built(config: DiffusionRun) -> DiT:
    mesh = Mesh.single()
    span = StageSpan(0, config.model.num_layers)
    model = DiTTask(config).make_stage(span, mesh, mesh.device, torch.float64)
    model.initialize(7)
    return model


def theirs(config: DiffusionRun, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for rule in SD3.rules(config.model):
        found.update(zip(rule.theirs, rule.to_hf(config.model, ours[rule.ours])))
    return found


def in_float64(norm: RMSNorm, x: Tensor) -> Tensor:
    """Theirs takes the mean square in fp32."""
    return torch.nn.functional.rms_norm(x, norm.dim, norm.weight, norm.eps)


@pytest.mark.parametrize("model", [{"position_grid": 9}, {"qk_norm": True}], ids=["sd3", "sd3.5"])
def test_the_prediction_the_loss_and_every_gradient_are_those_of_diffusers(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images wider than high, of which one counts nothing."""
    monkeypatch.setattr(RMSNorm, "forward", in_float64)
    config = configuration(**model)
    ours = built(config)
    parameters = dict(ours.named_parameters())
    other = SD3Transformer2DModel(**{k: v for k, v in SD3.to_config(config.model).items() if k[0] != "_"}).double()
    state = theirs(config, {name: p.detach() for name, p in parameters.items()})
    missing, unknown = other.load_state_dict(state, strict=False)
    assert not unknown and set(missing) <= {"pos_embed.pos_embed"}

    made_up = DiTTask(config).open_sources().train.batch(range(6))
    batch = to_tensors(made_up, made_up["counts"])
    batch = {**batch, **{name: torch.cat([batch[name]] * 2, -1)[..., :12] for name in ("images", "noise")}}
    batch["counts"][2] = False
    image, noise, u = batch["images"].double(), batch["noise"].double(), batch["time"]
    share = 1 / (1 + (-torch.special.ndtri(u)).exp())
    at = (3 * share / (1 + 2 * share)).view(-1, 1, 1, 1)
    noisy, time = (1 - at) * image + at * noise, 1000 * at.flatten()
    text, pooled = batch["text"].double(), batch["pooled"].double()
    predicted = other(noisy, text, pooled, time).sample
    with torch.no_grad():
        got = ours.predict({**batch, "images": noisy, "time": time})
    assert got.abs().max() > 0.5 and got.shape == (6, 3, 8, 12)
    torch.testing.assert_close(got, predicted, rtol=0, atol=1e-12)

    errors = (predicted - (noise - image)).square().sum((1, 2, 3)) * batch["counts"]
    errors.sum().backward()
    loss = ours(batch)
    loss.backward()
    assert loss.item() == pytest.approx(errors.sum().item(), rel=1e-10)
    assert DiTTask(config).count([batch]).item() == 5 * 3 * 8 * 12
    mine = theirs(config, {name: p.grad for name, p in parameters.items() if p.grad is not None})
    wanted = dict(other.named_parameters())
    assert mine.keys() == wanted.keys()
    for name, gradient in mine.items():
        want = wanted[name].grad
        idle = "blocks.2.attn.add_q_proj" in name or "blocks.2.attn.norm_added_q" in name  # nobody reads what they see
        assert want is not None and (want.abs().max() > 0) != idle, name
        torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-9, msg=name)


def _of_attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


@pytest.mark.parametrize("model", [{}, {"activation": "swiglu"}, {"condition": "class"}], ids=str)
def test_costs_are_what_a_forward_pass_multiplies(model: dict[str, Any]) -> None:
    config = configuration(**model)
    if model.get("condition"):
        config = configuration(**model, text_size=4096, text_tokens=154, pooled_size=2048)
    task, net = DiTTask(config), built(config)
    made_up = task.open_sources().train.batch(range(2))
    counted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention}  # torch counts a GPU's
    with FlopCounterMode(display=False, custom_mapping=counted) as counter, torch.no_grad():
        net(to_tensors(made_up, made_up["counts"]))
    assert 2 * task.tokens_per_sample * task.flops_per_token / 3 == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_sparse_attention_sees_the_blocks_of_its_layout() -> None:
    """48 patches and 16 tokens of text are four blocks: all of them as without a layout, some of them as it says."""
    sizes = {"image_size": 16, "text_tokens": 16, "num_layers": 1, "num_heads": 2, "hidden_size": 32}
    found = {}
    for mode, more in (("none", {}), ("dense", {"block": 16}), ("sliding_window", {"block": 16})):
        if mode == "sliding_window":
            more = {**more, "num_sliding_window_blocks": 1}
        config = configuration(**sizes, attention={"sparse": {"mode": mode, **more}})
        made_up = DiTTask(config).open_sources().train.batch(range(1))
        seen = {**to_tensors(made_up, made_up["counts"]), "time": torch.tensor([300.0])}
        seen["images"] = seen["images"][:, :, :12].double()
        found[mode] = [built(config).predict(seen)]
        seen["images"] = torch.cat([seen["images"][:, :, :-1], seen["images"][:, :, -1:] + 1], dim=2)
        found[mode].append(built(config).predict(seen))
    for one, other in zip(found["none"], found["dense"]):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    before, after = found["sliding_window"]
    # A block is two rows of patches: the last row of pixels is seen in its own block alone.
    assert torch.equal(before[:, :, :8], after[:, :, :8]) and not torch.equal(before[:, :, 8:], after[:, :, 8:])
    assert not torch.equal(found["none"][0][:, :, :8], found["none"][1][:, :, :8])


@pytest.mark.parametrize(
    ("values", "world", "message"),
    [
        ({"model": {**TEXT, "text_tokens": 5}, "mesh": {"tp": 2}}, 2, r"model\.text_tokens=5 cannot be .* use 4 or 6"),
        (
            {"model": {**TEXT, "attention": {"sparse": {"mode": "sliding_window"}}}},
            1,
            r"a sequence of 261 \(256 patches of model\.image_size=32 beside 5 tokens of text\) is not a multiple of",
        ),
        ({"model": {"attention": {"sparse": {"num_random_blocks": 3}}}}, 1, r"num_random_blocks=3 does nothing"),
        ({"mesh": {"cp": 2}}, 2, r"mesh\.cp=2: context parallelism is not built yet; use mesh\.cp=1"),
        ({"model": {"text_size": 5}}, 1, r"model\.text_size=5 does nothing: .* use model\.condition='text'"),
        ({"model": {**TEXT, "num_classes": 5}}, 1, r"model\.num_classes=5 does nothing: .* use model\.condition='cl"),
        ({"model": {"positions": "rope", "num_heads": 64}}, 1, r"'rope' with heads of 6: .* a multiple of 4"),
        ({"model": {"positions": "rope", "position_grid": 64}}, 1, r"position_grid=64 does nothing"),
        (
            {"model": {**TEXT, "image_size": 8, "channels": 1}, "data": {"source": "digits"}},
            1,
            r"has classes and no texts; use model\.condition='class'",
        ),
    ],
)
def test_what_does_not_fit_together_is_said_before_the_run(values: Any, world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(from_dict(DiffusionRun, values, "test"), world)
