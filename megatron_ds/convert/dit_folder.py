"""A diffusion transformer to and from folders of `diffusers`: `DiTTransformer2DModel`, and `DiTPipeline` around it.

One tensor at a time, by exact pairs of transforms: what is imported and exported again has the same bits. Each block of
`diffusers` has embeddings of time and class of its own, which are copies of one in published models; ours is one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ds.checkpoint.load import compare
from megatron_ds.checkpoint.manifest import step_name
from megatron_ds.checkpoint.meta import model_config
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.safetensors_header import DTYPES
from megatron_ds.checkpoint.stream import FILE_BYTES, StreamWriter, TensorFiles, plan_bytes
from megatron_ds.config.diffusion import DiTConfig, ObjectiveConfig
from megatron_ds.config.read import from_dict, values_to_toml
from megatron_ds.convert.folder import file_name, write_index
from megatron_ds.convert.hugging_face import MODEL_TOML, new_folder, publish_folder
from megatron_ds.convert.settings import Settings, must_be
from megatron_ds.data.latent_decoder import check_decoder, latents_of
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.files import read_json, write_text_durably
from megatron_ds.models.dit import DiT
from megatron_ds.models.samplers import make_scheduler
from megatron_ds.models.transformer import StageSettings
from megatron_ds.shard import spec_of
from megatron_ds.shard.flat_shards import FlatShard

CLASS, STEM = "DiTTransformer2DModel", "diffusion_pytorch_model"
NO_CLASS = 1000  # the label that DiTPipeline takes for guidance, whatever the model


@dataclass(frozen=True)
class Rule:
    """One of our tensors, what it is called in `diffusers`, and the two transforms, to theirs and back.

    ``copies``: ``theirs`` are all the same tensor.
    """

    ours: str
    theirs: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda w: (w,)
    join: Callable[[Sequence[Tensor]], Tensor] = lambda ws: ws[0]
    copies: bool = False


def rules(c: DiTConfig) -> list[Rule]:
    """Of every tensor."""
    h, p, blocks = c.hidden_size, c.patch_size, [f"transformer_blocks.{i}" for i in range(c.num_layers)]

    def same(ours: str, theirs: str) -> list[Rule]:
        return [Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]

    def copied(ours: str, theirs: str) -> Rule:
        names = tuple(f"{block}.norm1.emb.{theirs}" for block in blocks)
        return Rule(ours, names, lambda w: (w,) * len(names), copies=True)

    def stacked(ours: str, theirs: str, count: int) -> list[Rule]:
        def join(ws: Sequence[Tensor]) -> Tensor:
            return ws[0].view(count, h, *ws[0].shape[1:])

        return [
            Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",), lambda w: (w.flatten(0, 1),), join)
            for kind in ("weight", "bias")
        ]

    def qkv(ours: str, theirs: str) -> list[Rule]:
        def split(w: Tensor) -> list[Tensor]:
            return [w[:, part].reshape(h, *w.shape[3:]) for part in range(3)]

        def join(ws: Sequence[Tensor]) -> Tensor:
            return torch.stack([w.view(c.num_heads, c.head_size, *w.shape[1:]) for w in ws], dim=1)

        return [
            Rule(f"{ours}.{kind}", tuple(f"{theirs}.to_{part}.{kind}" for part in "qkv"), split, join)
            for kind in ("weight", "bias")
        ]

    embedder = [("time_in", "linear_1"), ("time_out", "linear_2")]
    found = [
        Rule(
            "patches.weight",
            ("pos_embed.proj.weight",),
            lambda w: (w.view(h, c.channels, p, p),),
            lambda ws: ws[0].reshape(h, -1),
        ),
        Rule("patches.bias", ("pos_embed.proj.bias",)),
        *(
            copied(f"condition.{ours}.{kind}", f"timestep_embedder.{theirs}.{kind}")
            for ours, theirs in embedder
            for kind in ("weight", "bias")
        ),
        copied("condition.classes.weight", "class_embedder.embedding_table.weight"),
    ]
    for i, block in enumerate(blocks):
        found += [
            *stacked(f"layers.{i}.modulation", f"{block}.norm1.linear", 6),
            *qkv(f"layers.{i}.attention.qkv", f"{block}.attn1"),
            *same(f"layers.{i}.attention.out", f"{block}.attn1.to_out.0"),
            *same(f"layers.{i}.mlp.up", f"{block}.ff.net.0.proj"),
            *same(f"layers.{i}.mlp.down", f"{block}.ff.net.2"),
        ]
    return [*found, *stacked("final_modulation", "proj_out_1", 2), *same("final", "proj_out_2")]


def global_shapes(c: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name to global shape of every tensor of the model."""
    specs = [spec_of(p) for p in DiT(c, ObjectiveConfig(), StageSettings(device="meta")).parameters()]
    return {spec.name: spec.global_shape for spec in specs}


def to_config(c: DiTConfig) -> dict[str, Any]:
    """config.json of the model."""
    if c.ffn_size != 4 * c.hidden_size:
        raise ConfigError(f"{CLASS} has an MLP of 4 x the width: model.ffn_hidden_size={c.ffn_size} cannot be exported")
    return {
        "_class_name": CLASS,
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.head_size,
        "in_channels": c.channels,
        "out_channels": c.channels,
        "num_layers": c.num_layers,
        "attention_bias": True,
        "sample_size": c.image_size,
        "patch_size": c.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": c.num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": c.norm_eps,
    }


def from_config(values: dict[str, Any], where: str) -> DiTConfig:
    """The model that a config.json describes, every setting of it read or refused."""
    config = Settings(values, where)
    must_be(config, attention_bias=True, activation_fn="gelu-approximate", norm_type="ada_norm_zero", dropout=0.0)
    must_be(config, norm_elementwise_affine=False, upcast_attention=False)
    channels = config.get("in_channels", 4)
    if config.get("out_channels", channels) != channels:
        raise ConfigError(
            f"{where}: out_channels={config['out_channels']} beside in_channels={channels}: learned variances are not "
            "built here, only models that predict as many channels as they see"
        )
    heads = config.get("num_attention_heads", 16)
    fields = {
        "num_layers": config.get("num_layers", 28),
        "hidden_size": heads * config.get("attention_head_dim", 72),
        "num_heads": heads,
        "image_size": config.get("sample_size", 32),
        "channels": channels,
        "patch_size": config.get("patch_size", 2),
        "num_classes": config.get("num_embeds_ada_norm", 1000),
        "norm_eps": config.get("norm_eps", 1e-5),
    }
    config.check_all_read(("_class_name", "_diffusers_version", "norm_num_groups", "_name_or_path"))
    return from_dict(DiTConfig, fields, where)


def export_transformer(
    checkpoint: str | Path, folder: str | Path, average: bool | None = None, file_bytes: int = FILE_BYTES
) -> Path:
    """Write a checkpoint's model as a folder that ``DiTTransformer2DModel.from_pretrained`` loads.

    Args:
        average: the moving average of the weights, or the weights. Default: the average where there is one.
    """
    folder = Path(folder)
    with Checkpoint(checkpoint) as source:
        config = model_config(DiTConfig, source.meta, source.directory)
        kind = kind_of(source, average)
        described, shapes = to_config(config), global_shapes(config)
        whole = [FlatShard.whole(name, kind, torch.empty(shape, device="meta")) for name, shape in shapes.items()]
        compare(source.manifest, source.directory, whole)
        made_by = {name: rule for rule in rules(config) for name in rule.theirs}
        plan = {}
        for name, rule in made_by.items():
            part = rule.split(torch.empty(shapes[rule.ours], device="meta"))[rule.theirs.index(name)]
            plan[name] = tuple(part.shape), DTYPES[source.record(rule.ours, kind).dtype]
        unfinished = new_folder(folder, plan_bytes(plan))
        files = TensorFiles(unfinished, plan, partial(file_name, STEM), file_bytes=file_bytes)
        try:
            for name in files.order:
                rule = made_by[name]
                files.write(name, rule.split(source.read(rule.ours, kind))[rule.theirs.index(name)].contiguous())
            files.finish()
            write_index(unfinished, STEM, files, plan)
            write_text_durably(unfinished / "config.json", json.dumps(described, indent=2) + "\n")
            publish_folder(unfinished, folder)
        except BaseException:
            files.abort()
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return folder


def kind_of(source: Checkpoint, average: bool | None) -> str:
    """The tensors of a checkpoint that are meant: the moving average of the weights, or the weights."""
    there = bool(source.names("ema"))
    if average and not there:
        raise CheckpointError(f"{source.directory} keeps no moving average; train with optimizer.ema_decay")
    return "ema" if (there if average is None else average) else "param"


def import_transformer(folder: str | Path, out_dir: str | Path) -> Path:
    """Write a folder of ``DiTTransformer2DModel`` as checkpoint ``step-00000000`` under ``out_dir``."""
    folder, out_dir = Path(folder), Path(out_dir)
    if (out_dir / step_name(0)).exists():
        raise CheckpointError(f"{out_dir / step_name(0)} exists already; import into another folder, or remove it")
    where = folder / "config.json"
    try:
        values = read_json(where)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    config = from_config(values, str(where))
    weights = _Weights(folder)
    table, shapes = rules(config), global_shapes(config)
    _require_tensors(weights, table, shapes, folder)
    plan = {rule.ours: (shapes[rule.ours], weights.found[rule.theirs[0]][1]) for rule in table}
    by_name = {rule.ours: rule for rule in table}
    meta = {"config": {"model": config.model_dump(mode="json")}}
    with StreamWriter(out_dir, 0, meta, plan) as writer:
        for name in writer.order:
            rule = by_name[name]
            parts = [weights.read(theirs) for theirs in rule.theirs]
            if rule.copies and not all(torch.equal(parts[0], part) for part in parts):
                raise CheckpointError(
                    f"{folder}: {rule.theirs[0]} and its like in other blocks differ. Here all blocks share one "
                    "embedding of time and class, as in published models; this one cannot be imported"
                )
            writer.write(name, rule.join(parts).contiguous())
        write_text_durably(out_dir / MODEL_TOML, values_to_toml(meta["config"]))
    return out_dir / step_name(0)


def _require_tensors(
    weights: _Weights, table: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """A :class:`CheckpointError` that names what is missing, unknown or of another shape."""
    problems: list[str] = []
    known: set[str] = set()
    for rule in table:
        for name, part in zip(rule.theirs, rule.split(torch.empty(shapes[rule.ours], device="meta"))):
            known.add(name)
            if name not in weights.found:
                problems.append(f"{name} is missing")
            elif weights.found[name][0] != tuple(part.shape):
                problems.append(f"{name} is {list(weights.found[name][0])} instead of {list(part.shape)}")
    problems += [f"{name} is unknown" for name in sorted(weights.found.keys() - known)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder} does not hold the {CLASS} it describes: {'; '.join(problems[:5])}{more}")


class _Weights:
    """The safetensors files of a folder. ``found``: name to shape and dtype."""

    def __init__(self, folder: Path):
        pattern = re.compile(rf"{STEM}(-\d+-of-\d+)?\.safetensors")
        self._files: dict[str, Any] = {}
        self.found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        paths = sorted(path for path in folder.glob("*.safetensors") if pattern.fullmatch(path.name))
        if not paths:
            raise CheckpointError(f"{folder} has no {STEM}.safetensors; save the model with save_pretrained")
        for path in paths:
            for name, shape, dtype in self._entries(path):
                self.found[name] = shape, DTYPES[dtype]
                self._files[name] = path

    @staticmethod
    def _entries(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    yield name, tuple(part.get_shape()), part.get_dtype()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def read(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def export_pipeline(
    checkpoint: str | Path, folder: str | Path, vae: str | Path | None = None, average: bool | None = None
) -> Path:
    """Write a checkpoint's model, its noise schedule and a decoder as a folder that ``DiTPipeline`` samples from.

    Args:
        vae: the folder of the `diffusers` VAE whose latents the model was trained on. Default: it was trained on
            pixels, and a decoder that changes nothing is written.
    """
    import diffusers

    folder = Path(folder)
    with Checkpoint(checkpoint) as source:
        config = model_config(DiTConfig, source.meta, source.directory)
        objective = from_dict(ObjectiveConfig, source.meta["config"].get("objective", {}), str(source.directory))
        _check_latents(source, None if vae is None else Path(vae))
    if objective.is_flow:
        raise ConfigError(
            "DiTPipeline knows no scheduler of rectified flow; export the transformer alone, or sample with "
            "tools/sample_images.py"
        )
    if config.num_classes != NO_CLASS:
        raise ConfigError(
            f"DiTPipeline takes class {NO_CLASS} for 'no class', and this model has model.num_classes="
            f"{config.num_classes}; train it with model.num_classes={NO_CLASS}, or export the transformer alone"
        )
    unfinished = new_folder(folder, 0)
    try:
        export_transformer(checkpoint, unfinished / "transformer", average)
        make_scheduler(objective, "ddim").save_pretrained(unfinished / "scheduler")
        if vae is None:
            decoder = identity_vae(config.channels)
            decoder.save_pretrained(unfinished / "vae")
            name = type(decoder).__name__
        else:
            shutil.copytree(vae, unfinished / "vae")
            name = str(read_json(unfinished / "vae" / "config.json")["_class_name"])
        index = {
            "_class_name": "DiTPipeline",
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", CLASS],
            "vae": ["diffusers", name],
        }
        write_text_durably(unfinished / "model_index.json", json.dumps(index, indent=2) + "\n")
        publish_folder(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def _check_latents(source: Checkpoint, vae: Path | None) -> None:
    """A `DiTPipeline` decodes with the VAE's own scale and knows no shift."""
    check_decoder(source.meta, vae, source.directory)
    if (trained := latents_of(source.meta)) is not None and trained["shift"]:
        raise ConfigError(
            f"{source.directory}: latents are shifted by {trained['shift']}, which DiTPipeline does not undo; export "
            "the transformer alone, or sample with tools/sample_images.py"
        )


def identity_vae(channels: int) -> Any:
    """A VAE of `diffusers` whose latents are the pixels: an ``AutoencoderTiny`` without blocks.

    Its decoder bends latents by ``3 tanh(z / 3)``. Latents are therefore pixels / 100, where that is straight to 4e-6;
    the ReLU between its two convolutions gets them once with each sign.
    """
    from diffusers import AutoencoderTiny

    scale, width = 100.0, 2 * channels
    vae = AutoencoderTiny(
        in_channels=channels,
        out_channels=channels,
        encoder_block_out_channels=(width,),
        decoder_block_out_channels=(width,),
        latent_channels=channels,
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        scaling_factor=scale,
    )
    both = torch.cat([torch.eye(channels), -torch.eye(channels)])
    first = torch.cat([torch.eye(channels), torch.zeros(channels, channels)])
    # The encoder sees (x + 1) / 2, and the decoder's result is doubled and lowered by 1.
    for layer, weight, bias in (
        (vae.encoder.layers[0], first, 0.0),
        (vae.encoder.layers[-1], first.t() * 2 / scale, -1 / scale),
        (vae.decoder.layers[0], both, 0.0),
        (vae.decoder.layers[-1], both.t() * scale / 2, 0.5),
    ):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, bias)
        layer.weight.data[:, :, 1, 1] = weight
    return vae
