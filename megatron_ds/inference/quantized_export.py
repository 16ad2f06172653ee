"""A folder of ``transformers`` with its linear layers in fewer bits, and what that changes of the model's answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from megatron_ds.checkpoint.stream import Plan
from megatron_ds.config import ModelConfig
from megatron_ds.convert import carried_files
from megatron_ds.convert.architecture import Rule
from megatron_ds.convert.conversion import exported_folder, write_converted
from megatron_ds.convert.folder import TRANSFORMERS, HFFolder
from megatron_ds.convert.hugging_face import described
from megatron_ds.convert.match import Match
from megatron_ds.errors import ConfigError
from megatron_ds.files import write_json
from megatron_ds.inference import served_model
from megatron_ds.inference.quantization import SCHEMES, quantize, scale_dtype
from megatron_ds.inference.quantized_folder import layout, quantization_config, tensors_of
from megatron_ds.inference.serving_recipes import linear_layers
from megatron_ds.mesh import Mesh
from megatron_ds.models.families import class_of
from megatron_ds.models.transformer import StageSettings
from megatron_ds.shard import spec_of


def export_quantized(model: str | Path, output: str | Path, scheme: str, progress: bool = False) -> Path:
    """Write the model of a folder of ``transformers`` in fewer bits, one tensor at a time.

    The weights are those that ``LLM(model, quantization=scheme)`` computes with in one process, but for the
    vocabulary's projection, which stays whole. Everything else of the folder goes along.

    Args:
        output: made here; must not exist or be empty. It appears only when it is complete.
        scheme: see :mod:`megatron_ds.inference.quantized_folder`.

    Raises:
        CheckpointError: the folder cannot be read. ConfigError: a scheme or a model that this does not go for.
    """
    model, output = Path(model), Path(output)
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"{model} is no folder of transformers; a checkpoint becomes one by tools/convert.py to-hf {model} FOLDER"
        )
    folder = HFFolder(model)
    architecture, config = described(folder)
    match = Match(folder, architecture, config)
    fewer = set(_of_linear_layers(match.config, match.rules, architecture.name))
    plan = _plan(match, fewer, scheme)
    with exported_folder(output, plan, TRANSFORMERS) as (partial, files):
        write_converted(files, plan, lambda name: _made(match, _weight_name(name), fewer, scheme), scheme, progress)
        carried_files.copy_all(folder, partial)
        _write_config(partial, folder, match, scheme)
    return output


def _of_linear_layers(config: ModelConfig, rules: Sequence[Rule], architecture: str) -> Iterator[str]:
    """The folder's weights of linear layers ``[out, in]``."""
    model = class_of(config)(config, StageSettings(device="meta"))
    specs = {(spec := spec_of(layer.weight)).name: spec for layer in linear_layers(model)}  # type: ignore[arg-type]
    for rule in rules:
        if rule.ours in specs:
            parts = rule.to_hf(config, torch.empty(*specs[rule.ours].global_shape[:-1], 1, device="meta"))
            if any(part.shape[-1] != 1 for part in parts):
                raise ConfigError(
                    f"{architecture} keeps its weights as [in, out] (Conv1D of transformers), for which there is no "
                    "form of quantised folders; serve the folder as it is with quantization=..."
                )
            yield from rule.theirs


def _plan(match: Match, fewer: set[str], scheme: str) -> Plan:
    plan: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name in (name for rule in match.rules for name in rule.theirs):
        shape, dtype = match.source.shapes[match.names[name]], match.source.dtypes[match.names[name]]
        if name in fewer:
            plan.update(layout(name, shape, scheme, SCHEMES[scheme].group, scale_dtype(dtype)))
        else:
            plan[name] = shape, dtype
    return plan


def _weight_name(part: str) -> str:
    for suffix in ("_packed", "_scale", "_shape"):
        if part.endswith(f".weight{suffix}"):
            return part.removesuffix(suffix)
    return part


def _made(match: Match, name: str, fewer: set[str], scheme: str) -> dict[str, Tensor]:
    tensor = match.source.read(match.names[name])
    return tensors_of(name, quantize(tensor, scheme)) if name in fewer else {name: tensor}


def _write_config(partial: Path, folder: HFFolder, match: Match, scheme: str) -> None:
    heads = {rule.theirs[0].removesuffix(".weight") for rule in match.rules if rule.ours == "head.weight"}
    said = quantization_config(scheme, sorted(heads | {"lm_head"}))  # what transformers calls it, whatever the files do
    config = {**folder.config, "architectures": [match.architecture.name], "quantization_config": said}
    if "tie_word_embeddings" in config or not match.config.tied_embeddings:
        config["tie_word_embeddings"] = match.config.tied_embeddings
    write_json(partial / carried_files.CONFIG, config)


@dataclass(frozen=True)
class Difference:
    """What two models say of the same text.

    Attributes:
        tokens: that were predicted. perplexities: of the first and the second model.
        logit: root of the mean square of the difference of logits, each token's taken about their mean, in parts of
            the root mean square of the first model's. largest: the largest difference of two logits' differences.
        kl: mean of the divergence from the first to the second, nats a token. agreement: tokens of which both models
            would choose the same.
    """

    tokens: int
    perplexities: tuple[float, float]
    logit: float
    largest: float
    kl: float
    agreement: float


@torch.no_grad()
def compare(
    first: str | Path, second: str | Path, windows: Sequence[Sequence[int]], progress: bool = False
) -> Difference:
    """Compare two models of one vocabulary, in one process, on windows of tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = Mesh.single(device)
    sources = [served_model.find(path) for path in (first, second)]
    models = [served_model.build(source, mesh, source.dtype) for source in sources]
    tokens, nll, kl, same, error, size, largest = 0, [0.0, 0.0], 0.0, 0, 0.0, 0.0, 0.0
    for window in tqdm(windows, desc="comparing", unit="window", disable=not progress):
        ids = torch.tensor([list(window)], device=device)
        batch = {"tokens": ids, "position_ids": torch.arange(ids.shape[1], device=device).unsqueeze(0)}
        logits = [model.logits(batch)[0, :-1].float() for model in models]
        one, two = (x - x.mean(1, keepdim=True) for x in logits)
        error += float((two - one).double().square().sum())
        size += float(one.double().square().sum())
        largest = max(largest, float((two - one).abs().max()))
        logs = [F.log_softmax(x.double(), 1) for x in logits]
        for index, log in enumerate(logs):
            nll[index] -= float(log.gather(1, ids[0, 1:, None]).sum())
        kl += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        same += int((logits[0].argmax(1) == logits[1].argmax(1)).sum())
        tokens += ids.shape[1] - 1
    before, after = (math.exp(x / tokens) for x in nll)
    return Difference(tokens, (before, after), math.sqrt(error / size), largest, kl / tokens, same / tokens)
