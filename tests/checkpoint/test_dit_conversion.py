"""Diffusion transformers to and from folders of `diffusers`: the same predictions, the same bits, the same images."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, SD3Transformer2DModel
from dit_checkpoints import assert_same_bits, configuration, imported, model_of, write_checkpoint

from megatron_ds.convert.dit_folder import export_transformer, import_transformer
from megatron_ds.convert.dit_pipelines import export_pipeline, identity_vae
from megatron_ds.convert.dit_tables import DIT, SD3, Table
from megatron_ds.convert.settings import Settings
from megatron_ds.data.latent_encoders import EncoderFolders
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.mesh import Mesh
from megatron_ds.models.samplers import Sampler
from megatron_ds.rng import derive_seed


def theirs(**more: Any) -> DiTTransformer2DModel:
    """With weights that matter everywhere; as in published models, every block's embeddings are the same."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=3, sample_size=8, patch_size=4,
        num_embeds_ada_norm=7, **more,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.mark.parametrize("more", [{}, {"out_channels": 6}], ids=["as many channels", "learned variances"])
def test_what_is_imported_predicts_the_same_and_is_exported_with_the_same_bits(
    more: dict[str, Any], tmp_path: Path
) -> None:
    model = theirs(**more)
    model.save_pretrained(tmp_path / "theirs")
    step, ours = imported(tmp_path / "theirs", tmp_path / "ours")
    images, times, labels = torch.randn(4, 3, 8, 8), torch.tensor([0.0, 999, 257, 300]), torch.tensor([0, 7, 3, 6])
    with torch.no_grad():
        got = ours.predict({"images": images, "time": times, "labels": labels})
        want = model(images, timestep=times, class_labels=labels).sample
    assert want.abs().max() > 0.5
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

    # In several files, which from_pretrained and the import find by the index and by their names.
    export_transformer(tmp_path / "ours", tmp_path / "again", file_bytes=20_000)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "again")
    assert {k: v for k, v in again.config.items() if not k.startswith("_")}.items() >= {
        name: value for name, value in model.config.items() if not name.startswith("_") and value is not None
    }.items()
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert_same_bits(import_transformer(tmp_path / "again", tmp_path / "ours again"), step)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: theirs(out_channels=5), r"out_channels=5 beside in_channels=3: .* twice as many"),
        (lambda: theirs(activation_fn="geglu"), r"activation_fn='geglu' .* is not supported"),
        (lambda: _with_other_embeddings(), r"norm1\.emb\..* in other blocks differ\. Here all blocks share one"),
    ],
)
def test_what_would_compute_something_else_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "theirs")
    with pytest.raises((ConfigError, CheckpointError), match=message):
        import_transformer(tmp_path / "theirs", tmp_path / "ours")
    assert not list((tmp_path / "ours").glob("step*"))


def _with_other_embeddings() -> DiTTransformer2DModel:
    model = theirs()
    model.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias.data += 1
    return model


@pytest.mark.parametrize(
    ("table", "theirs"), [(DIT, DiTTransformer2DModel), (SD3, SD3Transformer2DModel)], ids=["DiT", "SD3"]
)
def test_what_a_file_leaves_out_is_the_default_of_its_class(table: Table, theirs: type) -> None:
    every = {name: argument.default for name, argument in signature(theirs).parameters.items()}
    said, silent = (table.from_config(Settings(values)).resolved for values in (every, {}))
    assert silent == said and len(every) > 10


PUBLISHED = {  # DiT-XL/2 of 256 pixels, but for sizes
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 8, "cross_attention_dim": None, "dropout": 0.0, "in_channels": 3,
    "norm_elementwise_affine": False, "norm_num_groups": 32, "norm_type": "ada_norm_zero", "num_attention_heads": 2,
    "num_embeds_ada_norm": 7, "num_layers": 3, "num_vector_embeds": None, "only_cross_attention": False,
    "out_channels": 6, "patch_size": 4, "sample_size": 8, "upcast_attention": False, "use_linear_projection": False,
}  # fmt: skip


def test_published_models_of_the_older_class_are_imported(tmp_path: Path) -> None:
    model = theirs(out_channels=6)
    model.save_pretrained(tmp_path / "theirs")
    where = tmp_path / "theirs" / "config.json"
    where.write_text(json.dumps(PUBLISHED))
    _, ours = imported(tmp_path / "theirs", tmp_path / "ours")
    images, times, labels = torch.randn(2, 3, 8, 8), torch.tensor([999.0, 257]), torch.tensor([7, 3])
    with torch.no_grad():
        got = ours.predict({"images": images, "time": times, "labels": labels})
        want = model(images, timestep=times, class_labels=labels).sample
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for change, message in (
        ({"norm_type": None}, "lacks norm_type"),
        ({"norm_type": "ada_norm_single"}, "norm_type='ada_norm_single'"),
        ({"cross_attention_dim": 8}, "cross_attention_dim=8"),
        ({"interpolation_scale": 2}, "interpolation_scale=2"),
    ):
        where.write_text(json.dumps({**PUBLISHED, **change}))
        with pytest.raises(ConfigError, match=message):
            import_transformer(tmp_path / "theirs", tmp_path / "others")


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "num_layers": 4}))
    with pytest.raises(CheckpointError, match=r"missing: transformer_blocks\.3\.norm1\.emb\..* and \d+ more"):
        import_transformer(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "num_layers": 2, "patch_size": 2}))
    with pytest.raises(CheckpointError, match=r"pos_embed\.proj\.weight: \[16, 3, 4, 4\] instead of \[16, 3, 2, 2\]"):
        import_transformer(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "new_setting": 1}))
    with pytest.raises(ConfigError, match=r"settings that are not known here.*new_setting=1"):
        import_transformer(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has no diffusion_pytorch_model\.safetensors"):
        import_transformer(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        import_transformer(tmp_path / "nowhere", tmp_path / "ours")


def test_the_average_is_exported_where_there_is_one(tmp_path: Path) -> None:
    config = configuration()
    write_checkpoint(tmp_path / "both", config)
    write_checkpoint(tmp_path / "one", config, average=False)
    final = {seed: model_of(config, seed).final.weight for seed in (1, 2)}
    for source, average, seed in (("both", None, 2), ("both", False, 1), ("one", None, 1)):
        folder = export_transformer(tmp_path / source, tmp_path / f"{source}-{average}", average)
        assert torch.equal(DiTTransformer2DModel.from_pretrained(folder).proj_out_2.weight, final[seed])
    with pytest.raises(CheckpointError, match=r"keeps no moving average; train with optimizer\.ema_decay"):
        export_transformer(tmp_path / "one", tmp_path / "x", average=True)
    with pytest.raises(ConfigError, match="exists and is not an empty directory"):
        export_transformer(tmp_path / "one", tmp_path / "one-None")


@pytest.mark.parametrize("learned_variance", [False, True])
def test_a_pipeline_of_diffusers_draws_the_images_that_ours_draws(learned_variance: bool, tmp_path: Path) -> None:
    config = configuration({"prediction": "v", "schedule": "cosine"}, learned_variance=learned_variance)
    write_checkpoint(tmp_path / "run", config)
    pipeline = DiTPipeline.from_pretrained(export_pipeline(tmp_path / "run", tmp_path / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    classes = [3, 1000, 0]
    generators = [torch.Generator().manual_seed(derive_seed(5, "image", number)) for number in range(3)]
    shown = pipeline(classes, guidance_scale=3.0, num_inference_steps=4, generator=generators, output_type="np").images
    drawn = Sampler(config, tmp_path / "run", "ema", Mesh.single()).sample(classes, "ddim", 4, 3.0, seed=5)
    want = (drawn / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert want.std() > 0.1
    torch.testing.assert_close(torch.from_numpy(shown), want, rtol=0, atol=1e-4)


def test_what_a_pipeline_cannot_sample_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "flow", configuration({"prediction": "flow", "schedule": "flow"}))
    with pytest.raises(ConfigError, match="DiTPipeline knows no scheduler of rectified flow"):
        export_pipeline(tmp_path / "flow", tmp_path / "x")
    write_checkpoint(tmp_path / "few", configuration(num_classes=10))
    with pytest.raises(ConfigError, match="told classes: --text-encoder and --tokenizer do nothing; leave them out"):
        export_pipeline(tmp_path / "few", tmp_path / "x", EncoderFolders(None, [tmp_path], [tmp_path]))
    with pytest.raises(ConfigError, match=r"train it with model\.num_classes=1000"):
        export_pipeline(tmp_path / "few", tmp_path / "x")
    write_checkpoint(tmp_path / "wide", configuration(ffn_hidden_size=24))
    with pytest.raises(ConfigError, match=r"model\.ffn_hidden_size=24 cannot be exported"):
        export_pipeline(tmp_path / "wide", tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_decoder_of_pixels_changes_nothing(channels: int) -> None:
    vae, images = identity_vae(channels), torch.rand(2, channels, 8, 8) * 4 - 2
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(images / vae.config.scaling_factor).sample, images, rtol=0, atol=5e-5)
        latents = vae.encode(images).latents * vae.config.scaling_factor
    torch.testing.assert_close(latents, images, rtol=0, atol=1e-5)
