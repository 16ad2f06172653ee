"""Joint text-image transformers to and from folders of `SD3Transformer2DModel`: the same predictions, the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from dit_checkpoints import assert_same_bits, configuration, imported, write_checkpoint
from safetensors.torch import load_file, save_file

from megatron_ds.checkpoint import Checkpoint
from megatron_ds.convert.dit_folder import export_transformer, import_transformer
from megatron_ds.convert.dit_pipelines import export_pipeline
from megatron_ds.errors import CheckpointError, ConfigError, DataError

NAME = "diffusion_pytorch_model.safetensors"


def theirs(**more: Any) -> SD3Transformer2DModel:
    """Stable Diffusion 3 medium's settings, each divided (its widths 1536, 4096 and 2048 by 96, 341 and 409)."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 12, "caption_projection_dim": 16,
        "pooled_projection_dim": 5, "pos_embed_max_size": 12,
    }  # fmt: skip
    model = SD3Transformer2DModel(**{**settings, **more}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("more", [{}, {"qk_norm": "rms_norm"}, {"pos_embed_max_size": None}], ids=str)
def test_what_is_imported_predicts_the_same_and_is_exported_with_the_same_bits(
    more: dict[str, Any], tmp_path: Path
) -> None:
    model = theirs(**more)
    model.save_pretrained(tmp_path / "theirs")
    step, ours = imported(tmp_path / "theirs", tmp_path / "ours")
    images, times = torch.randn(3, 4, 12, 20), torch.tensor([0.0, 999.5, 257])
    text, pooled = torch.randn(3, 7, 12), torch.randn(3, 5)
    with torch.no_grad():
        got = ours.predict({"images": images, "time": times, "text": text, "pooled": pooled})
        want = model(images, text, pooled, times).sample
    assert want.abs().max() > 0.5
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

    export_transformer(tmp_path / "ours", tmp_path / "again")
    again, state = SD3Transformer2DModel.from_pretrained(tmp_path / "again"), model.state_dict()
    mine = {name: value for name, value in again.config.items() if not name.startswith("_")}
    assert {**mine, "dual_attention_layers": ()} == {k: v for k, v in model.config.items() if not k.startswith("_")}
    assert load_file(tmp_path / "again" / NAME).keys() == state.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert_same_bits(import_transformer(tmp_path / "again", tmp_path / "ours again"), step)


def test_of_two_saves_in_a_folder_the_one_that_diffusers_reads_is_imported(tmp_path: Path) -> None:
    """The shards of the index, whatever else lies beside them: what an export in fewer files has left, or one file."""
    model, folder = theirs(), tmp_path / "theirs"
    model.save_pretrained(folder, max_shard_size="8KB")
    count = len(list(folder.glob("*.safetensors")))
    state = SD3Transformer2DModel.from_pretrained(folder).state_dict()
    older = {name: tensor + 1 for name, tensor in state.items()}
    for name in (f"diffusion_pytorch_model-00001-of-{count + 1:05d}.safetensors", NAME):
        save_file(older, folder / name, {"format": "pt"})
        again = SD3Transformer2DModel.from_pretrained(folder).state_dict()
        assert count > 2 and all(torch.equal(again[name], tensor) for name, tensor in state.items())
        import_transformer(folder, tmp_path / name)
        with Checkpoint(tmp_path / name) as checkpoint:
            assert torch.equal(checkpoint.read("patches.bias"), state["pos_embed.proj.bias"])
    (folder / f"{NAME}.index.json").unlink()
    (folder / NAME).unlink()
    with pytest.raises(CheckpointError, match=r"but no diffusion_pytorch_model\.safetensors\.index\.json, which says"):
        import_transformer(folder, tmp_path / "unlisted")
    fewer = {name: tensor.to(torch.float8_e4m3fn) if tensor.dim() == 2 else tensor for name, tensor in state.items()}
    save_file(fewer, folder / NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"is torch\.float8_e4m3fn, quantised: dequantise first"):
        import_transformer(folder, tmp_path / "fp8")


def test_what_would_compute_something_else_is_refused(tmp_path: Path) -> None:
    theirs(dual_attention_layers=(0, 1)).save_pretrained(tmp_path / "dual")
    with pytest.raises(ConfigError, match=r"dual_attention_layers=\[0, 1\] .* one attention here"):
        import_transformer(tmp_path / "dual", tmp_path / "ours")
    theirs(qk_norm="layer_norm").save_pretrained(tmp_path / "norm")
    with pytest.raises(ConfigError, match=r"qk_norm='layer_norm' .* only 'rms_norm' and none"):
        import_transformer(tmp_path / "norm", tmp_path / "ours")
    theirs().save_pretrained(tmp_path / "theirs")
    where = tmp_path / "theirs" / "config.json"
    values = json.loads(where.read_text())
    for change, message in (
        ({"caption_projection_dim": 8}, r"caption_projection_dim=8 .* only 16"),
        ({"_class_name": "FluxTransformer2DModel"}, r"describes a FluxTransformer2DModel; this imports DiT"),
        ({"sample_size": 20}, r"pos_embed\.pos_embed is not the table of sines that the configuration describes"),
    ):
        where.write_text(json.dumps({**values, **change}))
        with pytest.raises((ConfigError, CheckpointError), match=message):
            import_transformer(tmp_path / "theirs", tmp_path / "ours")
    where.write_text(json.dumps(values))
    tensors = load_file(tmp_path / "theirs" / NAME)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}  # a published table is rounded
    save_file(half, tmp_path / "theirs" / NAME)
    import_transformer(tmp_path / "theirs", tmp_path / "half")


def test_what_diffusers_has_no_class_for_is_refused(tmp_path: Path) -> None:
    text = {"condition": "text", "text_size": 12, "text_tokens": 4, "pooled_size": 5, "num_classes": 1000}
    for number, (model, message) in enumerate(
        (
            ({"activation": "swiglu"}, r"model\.activation='swiglu' cannot be exported: SD3Transformer2DModel has"),
            ({"positions": "rope"}, r"model\.positions='rope' cannot be exported"),
            ({"attention": {"sparse": {"mode": "dense"}}}, r"sparse\.mode='dense' cannot be exported: SD3Transformer"),
            ({"norm_eps": 1e-5}, r"model\.norm_eps=1e-05 cannot be exported"),
        )
    ):
        write_checkpoint(tmp_path / str(number), configuration(**text, **model), average=False)
        with pytest.raises(ConfigError, match=message):
            export_transformer(tmp_path / str(number), tmp_path / "x")
    with pytest.raises(ConfigError, match="told texts, and StableDiffusion3Pipeline knows no other than"):
        export_pipeline(tmp_path / "0", tmp_path / "x")
    flow = configuration({"prediction": "flow", "schedule": "flow"}, **text)
    write_checkpoint(tmp_path / "flow", flow, average=False)
    with pytest.raises(DataError, match=r"not trained on texts of tools/cache_latents.py; what encodes prompts is unk"):
        export_pipeline(tmp_path / "flow", tmp_path / "x")
    write_checkpoint(tmp_path / "class", configuration(qk_norm=True), average=False)
    with pytest.raises(ConfigError, match=r"model\.qk_norm=True cannot be exported: DiTTransformer2DModel has False"):
        export_transformer(tmp_path / "class", tmp_path / "x")
    assert not list(tmp_path.glob("x*"))
