"""A model to serve, from a checkpoint of ours or a folder of ``transformers``, on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint.load import load
from megatron_ds.checkpoint.meta import model_config
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.config import ModelConfig
from megatron_ds.config.transformer import rotary_faults, split_faults
from megatron_ds.convert import carried_files
from megatron_ds.convert.folder import ADAPTER, HFFolder
from megatron_ds.convert.hugging_face import described
from megatron_ds.convert.match import Match
from megatron_ds.convert.settings import GENERATION
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.files import read_json
from megatron_ds.inference.quantized_folder import QuantizedFolder, weight_of
from megatron_ds.inference.serving_recipes import linear_layers, use_weight
from megatron_ds.mesh import Mesh
from megatron_ds.models.families import class_of
from megatron_ds.models.transformer import StageSettings, Transformer
from megatron_ds.pipeline.layer_split import split_layers
from megatron_ds.pipeline.stage import stage_spans
from megatron_ds.shard import spec_of
from megatron_ds.shard.flat_shards import FlatShard


@dataclass(frozen=True)
class Source:
    """What is known of a model before any of its weights is read.

    Attributes:
        weights: the files as ``transformers`` has them, or a checkpoint's directory.
        kind: of a checkpoint's tensors: its weights, or the moving average of them where it keeps one.
        dtype: that most of its weights have.
        tokenizer: the folder with its tokenizer, where there is one.
        generation: what generation_config.json and config.json say of generation.
        longest: tokens of a text that the model was made for; None: nothing says it.
        notes: what should be said of the choice of the files.
        quantization: the scheme of the linear layers' weights in the files; None: they are whole.
    """

    config: ModelConfig
    weights: Match | Path
    dtype: torch.dtype
    tokenizer: Path | None
    generation: Mapping[str, Any]
    longest: int | None = None
    notes: tuple[str, ...] = ()
    quantization: str | None = None
    kind: str = "param"


def find(path: str | Path) -> Source:
    """The model at ``path``.

    Raises:
        CheckpointError, ConfigError: there is none, or none of a family that can be served.
    """
    path = Path(path)
    is_folder = any((path / name).is_file() for name in ("config.json", ADAPTER))
    source = _in_folder(path) if is_folder else _in_checkpoint(path)
    c = source.config
    if not c.causal:
        raise ConfigError(f"{path} holds a {c.family} model, which is no decoder: only those generate text")
    if faults := list(rotary_faults(c)):
        raise ConfigError(f"{path} holds a model that cannot be computed: {'; '.join(faults)}")
    scaling = (c.rope_scaling or {}).get("rope_type") if c.position == "rope" else None
    if scaling in ("dynamic", "longrope"):
        raise ConfigError(
            f"{path}: rope_scaling of type {scaling!r} turns all keys anew when a text grows, which a key/value cache "
            "cannot; generate with transformers, or convert the model to another scaling"
        )
    if c.attention.sparse.mode != "none":
        raise ConfigError(f"{path} has block-sparse attention, whose blocks a key/value cache does not serve")
    return source


def _in_folder(path: Path) -> Source:
    quantized = _says_quantized(path)
    folder = QuantizedFolder(path) if quantized else HFFolder(path)
    architecture, config = described(folder)
    match = Match(folder, architecture, config)
    names = [match.names[name] for rule in match.rules for name in rule.theirs]
    plain = names if not isinstance(folder, QuantizedFolder) else [n for n in names if n not in folder.quantized]
    dtypes = [folder.dtypes[name] for name in plain]
    there = (path / carried_files.GENERATION).is_file()
    generation = _generation(folder.config, folder.json(carried_files.GENERATION) if there else {})
    return Source(
        match.config, match, max(dict.fromkeys(dtypes), key=dtypes.count), _tokenizer_in(path), generation,
        _longest(match.config, generation.get("max_position_embeddings")), (*folder.notes, *match.notes),
        folder.scheme if isinstance(folder, QuantizedFolder) else None,
    )  # fmt: skip


def _says_quantized(path: Path) -> bool:
    try:
        said = read_json(path / "config.json")
    except (OSError, ValueError):
        return False  # the folder's reader says what is wrong
    return isinstance(said, dict) and bool(said.get("quantization_config"))


def _generation(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """config.json and generation_config.json as one. Of how tokens are drawn the latter alone says something, as in
    ``transformers`` since version 5."""
    drawing = GENERATION - {"eos_token_id"}
    return {**{key: value for key, value in config.items() if key not in drawing}, **own}


def _longest(c: ModelConfig, said: Any) -> int | None:
    if c.position == "learned":
        return c.max_positions
    scaling: Mapping[str, Any] = c.rope_scaling or {}
    if not isinstance(said, int) or said <= 0:
        return None
    if scaling.get("rope_type") == "yarn":  # whose files often have the length from before it was scaled
        return max(said, int(scaling["factor"] * scaling["original_max_position_embeddings"]))
    return said


def _in_checkpoint(path: Path) -> Source:
    with Checkpoint(path) as checkpoint:
        config = model_config(ModelConfig, checkpoint.meta, checkpoint.directory)
        kind = checkpoint.weights_kind()
        dtypes = [checkpoint.dtype(name, kind) for name in checkpoint.names(kind)]
        home = checkpoint.directory.parent
        trained = checkpoint.meta.get("config", {}).get("train", {}).get("sequence_length")
    said = (carried_files.settings(home, name) for name in (carried_files.CONFIG, carried_files.GENERATION))
    generation = _generation(*said)
    longest = _longest(config, generation.get("max_position_embeddings", trained))
    tokenizer = _tokenizer_in(home / "tokenizer")
    dtype = max(dict.fromkeys(dtypes), key=dtypes.count)  # of several the first, on every rank
    return Source(config, path, dtype, tokenizer, generation, longest, kind=kind)


def _tokenizer_in(folder: Path) -> Path | None:
    names = ("tokenizer.json", "tokenizer.model")
    return folder if any((folder / name).is_file() for name in names) else None


def build(source: Source, mesh: Mesh, dtype: torch.dtype) -> Transformer:
    """The stage of this rank, with its part of the weights, in evaluation mode.

    Raises:
        CheckpointError: on every rank, where weights cannot be read.
    """
    c = source.config
    span = stage_spans(split_layers(c.num_layers, mesh.pp.size))[mesh.pp.rank]
    model = class_of(c)(c, StageSettings(mesh, span, device=mesh.device, dtype=dtype)).eval()
    model.requires_grad_(False)
    if isinstance(source.weights, Path):
        load(source.weights, [FlatShard.of(spec_of(p), source.kind, p.data) for p in model.parameters()], mesh.world)
        return model
    rules = {rule.ours: rule for rule in source.weights.rules}
    folder, names = source.weights.source, source.weights.names
    layers = {spec_of(layer.weight).name: layer for layer in linear_layers(model)}  # type: ignore[arg-type]
    for parameter in model.parameters():
        spec = spec_of(parameter)
        rule = rules[spec.name]
        theirs = [names[name] for name in rule.theirs]
        if isinstance(folder, QuantizedFolder) and folder.quantized.intersection(theirs):
            if spec.name not in layers or not folder.quantized.issuperset(theirs):
                raise CheckpointError(
                    f"{folder.path}: of {', '.join(theirs)}, some are quantised and some are not, or they are of no "
                    "linear layer of a block, which alone may be"
                )
            layer, parts = layers[spec.name], [folder.read_quantized(name) for name in theirs]
            use_weight(layer, weight_of(layer, rule, c, parts))
        else:
            parameter.data.copy_(spec.slice_of(rule.from_hf(c, source.weights.read(rule))))
    return model


def require_split(c: ModelConfig, tp: int, pp: int) -> None:
    """Raises :class:`ConfigError` where a model cannot be split over ``tp x pp`` ranks."""
    if faults := list(split_faults(c, tp, "tensor_parallel_size")):
        raise ConfigError("; ".join(faults))
    if pp > c.num_layers:
        raise ConfigError(f"pipeline_parallel_size={pp} is more than the {c.num_layers} layers; use as many at most")


def text_length(source: Source, asked: int | None) -> int:
    """Tokens that a text may have: what is asked for, else what the model was made for.

    Raises:
        ConfigError: the model has no positions for so many.
    """
    longest = source.longest
    if asked is None:
        return longest or 2048
    if asked < 2 or (longest is not None and asked > longest):
        most = "any number from 2 on" if longest is None else f"2 to {longest}"
        raise ConfigError(f"max_model_len={asked}: the model was made for {most} tokens")
    return asked
