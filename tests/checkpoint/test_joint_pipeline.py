"""Text-to-image models beside their text encoders: `StableDiffusion3Pipeline` is the reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from dit_checkpoints import configuration, model_of
from sample_rank import main
from small_images import sd3_encoders, write_vae
from started_ranks import started

from megatron_ds.checkpoint.save import save
from megatron_ds.convert.dit_pipelines import export_pipeline
from megatron_ds.data.latent_encoders import (
    EncoderFolders,
    LatentDecoder,
    TextEncoder,
    VaeConfig,
    check_text_encoders,
    encode_prompts,
    model_identity,
    text_identities,
)
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.mesh import Mesh
from megatron_ds.models.samplers import Sampler
from megatron_ds.rng import derive_seed
from megatron_ds.shard import spec_of
from megatron_ds.shard.flat_shards import FlatShard
from megatron_ds.train.launch import run_main

TOKENS, PROMPTS = 5, ["a temple with 4 roofs", "a temple"]
TEXT = {"condition": "text", "num_classes": 1000, "text_size": 48, "text_tokens": 8 + TOKENS, "pooled_size": 40}
FLOW = {"prediction": "flow", "schedule": "flow", "shift": 3.0, "density": "logit_normal"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> EncoderFolders:
    root = tmp_path_factory.mktemp("sd3")
    encoders = sd3_encoders(root)
    return EncoderFolders(write_vae(root / "vae", shift=None), encoders, encoders)


def write_run(folder: Path, parts: EncoderFolders, **change: Any) -> Path:
    """A checkpoint of a model that was trained on a cache which these encoders made."""
    config = configuration(FLOW, channels=4, **TEXT)
    shards = [FlatShard.of(spec_of(p), "param", p.data) for p in model_of(config, 1).parameters()]
    assert parts.vae is not None
    vae = VaeConfig.read(parts.vae)
    texts = {"encoders": text_identities(parts), "states": "penultimate"}
    latents = {"scale": vae.scale, "shift": vae.shift, "vae": model_identity(parts.vae)}
    latents["texts"] = {**texts, "tokens": TOKENS, **change}
    save(folder, 3, shards, {"config": config.to_dict(), "data": {"latents": latents}})
    return folder


@pytest.fixture(scope="module")
def run(parts: EncoderFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), parts)


@pytest.fixture(scope="module")
def pipeline(run: Path, parts: EncoderFolders, tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion3Pipeline:
    folder = export_pipeline(run, tmp_path_factory.mktemp("exported") / "pipeline", parts)
    loaded = StableDiffusion3Pipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def meta_of(run: Path) -> dict[str, Any]:
    from megatron_ds.checkpoint import Checkpoint

    with Checkpoint(run) as saved:
        return dict(saved.meta)


def encoded(run: Path, parts: EncoderFolders) -> dict[str, torch.Tensor]:
    texts = check_text_encoders(meta_of(run), parts, run)
    return encode_prompts(texts, parts, PROMPTS, torch.device("cpu"))


def test_texts_are_encoded_as_stable_diffusion_3_does(
    run: Path, parts: EncoderFolders, pipeline: StableDiffusion3Pipeline
) -> None:
    found = encoded(run, parts)
    with torch.no_grad():
        text, no_text, pooled, no_pooled = pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=TOKENS)
    want = {"text": text, "pooled": pooled, "empty.text": no_text[:1], "empty.pooled": no_pooled[:1]}
    assert found.keys() == want.keys() and text.shape == (2, 8 + TOKENS, 48) and pooled.shape == (2, 40)
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert not torch.equal(text[0], text[1]) and not text[:, :8, 40:].any()  # CLIP's states end in zeros


def test_a_pipeline_of_diffusers_draws_the_images_that_ours_draws(
    run: Path, parts: EncoderFolders, pipeline: StableDiffusion3Pipeline
) -> None:
    generators = [torch.Generator().manual_seed(derive_seed(5, "image", number)) for number in range(2)]
    shown = pipeline(
        PROMPTS,
        guidance_scale=3.0,
        num_inference_steps=4,
        generator=generators,
        max_sequence_length=TOKENS,
        output_type="np",
    ).images
    config = configuration(FLOW, channels=4, **TEXT)
    latents = Sampler(config, run, "param", Mesh.single()).sample(encoded(run, parts), "flow", 4, 3.0, seed=5)
    assert parts.vae is not None
    drawn = LatentDecoder(parts.vae, meta_of(run), torch.device("cpu")).decode(latents)
    want = (drawn / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert want.std() > 0.02 and (want[0] - want[1]).abs().max() > 0.05
    torch.testing.assert_close(torch.from_numpy(shown), want, rtol=0, atol=1e-4)


def test_prompts_are_drawn_by_the_tool_on_every_mesh(
    run: Path,
    parts: EncoderFolders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first of several ranks alone encodes prompts; the others draw from what it gives them."""

    def words(*more: object) -> list[str]:
        common = (run, "--vae", parts.vae, "--steps", 2, "--device", "cpu", "--columns", 2)
        return [str(word) for word in (*common, *more)]

    def draw(*more: object) -> int:
        monkeypatch.setattr("sys.argv", ["sample_images.py", *words(*more)])
        return run_main(main)

    encoders = ("--text-encoder", *parts.text, "--tokenizer", *parts.tokenizers)
    assert draw("--text", *PROMPTS, *encoders, "--output", tmp_path / "one") == 0
    images, columns = torch.load(tmp_path / "one")
    rows = {name: t if name[:5] == "empty" else t.repeat_interleave(2, 0) for name, t in encoded(run, parts).items()}
    config = configuration(FLOW, channels=4, **TEXT)
    latents = Sampler(config, run, "param", Mesh.single()).sample(rows, "flow", 2, 2.0)
    assert parts.vae is not None and columns == 2
    assert torch.equal(images, LatentDecoder(parts.vae, meta_of(run), torch.device("cpu")).decode(latents))
    on_ranks = words("--text", *PROMPTS, *encoders, "--output", tmp_path / "two", "--tp", 2)
    with started(tmp_path / "ranks", [on_ranks] * 2, main=main) as ranks:
        assert ranks.wait(120) == [0] * 2, ranks.everything()
    torch.testing.assert_close(torch.load(tmp_path / "two")[0], images, rtol=1e-3, atol=1e-3)
    for arguments, message in (
        (("--text", "a"), "of 3 encoders (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel)"),
        (("--text", "a", "--classes", 1, *encoders), "--classes and --text: an image is of a class or of a text"),
        (encoders, "--text-encoder and --tokenizer encode what --text says"),
        ((), "told texts and no classes; give them with --text"),
    ):
        assert draw(*arguments) == 2
        assert message in capsys.readouterr().err


def test_what_the_pipeline_would_compute_in_another_way_is_refused(
    run: Path, parts: EncoderFolders, tmp_path: Path
) -> None:
    first, second, third = parts.text
    other = tmp_path / "other"
    shutil.copytree(first, other)
    values = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**values, "model_max_length": 7}))
    write_run(tmp_path / "last", parts, states="last")
    two = EncoderFolders(parts.vae, [first, second], [first, second])
    write_run(tmp_path / "two", two)
    for source, given, error, message in (
        (
            run,
            EncoderFolders(parts.vae, [second, first, third], parts.tokenizers),
            DataError,
            r"clip-2 is not what .* ",
        ),
        (run, EncoderFolders(parts.vae, parts.text, [other, second, third]), DataError, "its tokenizer differ"),
        (run, EncoderFolders(None, parts.text, parts.tokenizers), DataError, "give its folder with --vae"),
        (run, EncoderFolders(parts.vae, [first], []), DataError, "1 text encoders with 0 tokenizers"),
        (tmp_path / "last", parts, ConfigError, "trained on last states of .*takes penultimate ones of CLIPText"),
        (tmp_path / "two", two, ConfigError, "penultimate states of CLIP.*Projection, CLIP.*Projection, and Stable"),
    ):
        with pytest.raises(error, match=message):
            export_pipeline(source, tmp_path / "x", given)
    assert not list(tmp_path.glob("x*"))
    with pytest.raises(DataError, match=r"CLIP encoders of \[7, 8\] tokens cannot be joined"):
        TextEncoder(
            EncoderFolders(None, [first, second], [other, second]), "last", None, torch.device("cpu"), torch.float32
        )
