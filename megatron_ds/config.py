"""Every setting of a run: typed, frozen, documented by its own fields.

A run is described by one :class:`RunConfig`. It is read from a TOML file and dotted command-line overrides
(:func:`parse`), and passes :func:`validate` once, before any process group exists. Nothing is corrected in silence:
an unknown key, a contradiction or a size that does not divide is a :class:`~megatron_ds.errors.ConfigError` which
names the values and what would work.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import tyro
from pydantic import BaseModel, ConfigDict, Field

from megatron_ds.errors import ConfigError, nearest
from megatron_ds.mesh import MeshShape


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(_Section):
    """The transformer. One description covers GPT-2, GPT-3, Llama 2/3 and BLOOM."""

    num_layers: int = Field(12, gt=0, description="Transformer blocks.")
    hidden_size: int = Field(768, gt=0, description="Width of the residual stream.")
    num_heads: int = Field(12, gt=0, description="Query heads.")
    kv_heads: int | None = Field(
        None,
        gt=0,
        description="Key/value heads; fewer than num_heads is grouped-query attention. Default: num_heads.",
    )
    head_dim: int | None = Field(
        None, gt=0, description="Width of one head. Default: hidden_size / num_heads."
    )
    ffn_hidden_size: int | None = Field(
        None,
        gt=0,
        description="Width inside the MLP. Default: 4 x hidden_size; SwiGLU 8/3 x, rounded up to 64.",
    )
    vocab_size: int = Field(50257, gt=0, description="Tokens of the tokenizer; ids are 0..vocab_size-1.")
    vocab_multiple: int = Field(
        128, gt=0, description="The embedding is padded to a multiple of this, which every tp must divide."
    )
    max_positions: int = Field(1024, gt=0, description="Longest sequence of learned positions, in tokens.")
    position: Literal["learned", "rope", "alibi", "none"] = Field(
        "learned", description="How positions enter."
    )
    rope_theta: float = Field(10000.0, gt=0, description="Base wavelength of rotary embeddings.")
    rope_scaling: dict[str, float | int | str | bool] | None = Field(
        None,
        description="Llama-3 style rotary scaling: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.",
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Normalisation layer.")
    norm_eps: float = Field(1e-5, gt=0, description="Added to the variance.")
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = Field("gelu_tanh", description="MLP non-linearity.")
    bias: bool = Field(True, description="Biases in the linear layers.")
    qkv_bias: bool | None = Field(None, description="Bias of the query/key/value projection. Default: bias.")
    tied_embeddings: bool = Field(True, description="The output head is the token embedding.")
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys a head.")
    embedding_norm: bool = Field(False, description="LayerNorm after the token embedding (BLOOM).")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of initial weights.")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of attention probabilities.")
    hidden_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout of the embedding and of each block's outputs."
    )

    @property
    def groups(self) -> int:
        """Key/value heads: the unit that tensor parallelism splits attention by."""
        return self.kv_heads or self.num_heads

    @property
    def queries_per_group(self) -> int:
        return self.num_heads // self.groups

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return (
            -(-8 * self.hidden_size // (3 * 64)) * 64 if self.activation == "swiglu" else 4 * self.hidden_size
        )

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: a fixed multiple that does not come from the mesh, so that layouts never depend on it."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class MeshConfig(_Section):
    """How many ranks along each axis; tp is kept inside a node."""

    tp: int = Field(1, gt=0, description="Tensor-parallel ranks: each layer's matrices are split over them.")
    pp: int = Field(1, gt=0, description="Pipeline stages: the layers are split over them.")
    cp: int = Field(1, gt=0, description="Context-parallel ranks; only 1 for now.")
    dp: int | None = Field(
        None, gt=0, description="Data-parallel replicas. Default: what the world size leaves."
    )
    sequence_parallel: bool = Field(
        True, description="Outside tensor-parallel layers split activations along the sequence over tp."
    )


class PipelineConfig(_Section):
    """When a stage does what."""

    schedule: Literal["1f1b", "gpipe"] = Field("1f1b", description="Order of forwards and backwards.")
    split: Literal["count", "cost"] = Field(
        "count", description="Layers a stage: evenly by count, or by cost with embedding and head counted."
    )
    layers_per_stage: tuple[int, ...] | None = Field(
        None, description="Explicit split, e.g. 3 4 4 1; overrides split."
    )


class ZeroConfig(_Section):
    """Whose memory holds the optimizer's state."""

    stage: Literal[0, 1] = Field(1, description="0: every replica holds it all. 1: sharded over dp.")
    bucket_mb: float = Field(
        25.0, gt=0, description="MB of gradients reduced at a time, while the backward pass goes on."
    )
    overlap: bool = Field(True, description="Reduce buckets during the last backward pass, not after it.")


class OptimizerConfig(_Section):
    """The update rule. Learning rates are per step."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="torch's fused AdamW, or SGD with momentum.")
    lr: float = Field(3e-4, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = Field(
        "cosine", description="Shape of the decay after warm-up; wsd is warm-up, stable, decay."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from 0.")
    decay_steps: int | None = Field(
        None, gt=0, description="Step at which min_lr is reached. Default: train.steps."
    )
    wsd_decay_fraction: float = Field(
        0.1, gt=0, le=1, description="Share of decay_steps that wsd spends decaying."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="AdamW's denominator offset.")
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD's momentum.")
    weight_decay: float = Field(
        0.1, ge=0, description="Decay of matrices; biases and norms are never decayed."
    )
    clip_norm: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 turns clipping off.")


class PrecisionConfig(_Section):
    """Number formats. Gradients are always accumulated and master weights kept in fp32 (fp64 for fp64)."""

    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32", description="Format of weights and activations."
    )
    loss_scale: float | None = Field(None, gt=0, description="Fixed fp16 loss scale. Default: dynamic.")
    initial_loss_scale: float = Field(65536.0, gt=0, description="Where the dynamic fp16 loss scale starts.")
    loss_scale_window: int = Field(1000, gt=0, description="Good steps before the scale doubles.")
    loss_scale_hysteresis: int = Field(2, gt=0, description="Overflowing steps before the scale halves.")
    min_loss_scale: float = Field(1.0, gt=0, description="The scale never falls below this.")


class RecomputeConfig(_Section):
    """What the backward pass computes again instead of keeping."""

    mode: Literal["none", "selective", "full", "every_n"] = Field(
        "none", description="selective: the attention core; full: every block; every_n: every n-th block."
    )
    every: int = Field(2, gt=0, description="n of every_n.")


class DataConfig(_Section):
    """Where the tokens come from."""

    prefix: str | None = Field(None, description="Path of the indexed dataset without .bin/.idx.")
    split: str = Field("969,30,1", description="Weights of the train, valid and test documents.")
    tokenizer: str | None = Field(
        None, description="Tokenizer folder; checked against the dataset, and exported."
    )
    synthetic: bool = Field(False, description="Random tokens instead of a dataset, for measuring speed.")
    document_masking: bool = Field(
        False, description="Attention and positions do not cross document boundaries in a packed sequence."
    )
    prefetch: int = Field(2, ge=0, description="Global batches read ahead by a background thread.")


class TrainConfig(_Section):
    """How much, and in what portions."""

    steps: int = Field(1000, gt=0, description="Optimizer steps of the whole run.")
    global_batch: int = Field(8, gt=0, description="Sequences an optimizer step.")
    micro_batch: int = Field(1, gt=0, description="Sequences a forward pass on one replica.")
    sequence_length: int = Field(1024, gt=0, description="Tokens a sequence.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target spread over the vocabulary."
    )
    z_loss: float = Field(0.0, ge=0, description="Weight of the squared log-partition penalty.")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0 for none.")
    eval_batches: int = Field(8, gt=0, description="Global batches an evaluation.")
    max_skipped_steps: int = Field(
        50, gt=0, description="Consecutive steps skipped for NaN or Inf gradients before the run is stopped."
    )


class CheckpointConfig(_Section):
    """What is written, when, and where a run starts from."""

    save_every: int = Field(0, ge=0, description="Steps between checkpoints; 0: only at the end.")
    save_at_end: bool = Field(True, description="Write a checkpoint after the last step.")
    keep_last: int | None = Field(None, gt=0, description="Older checkpoints are deleted. Default: keep all.")
    resume: bool = Field(False, description="Continue from the latest checkpoint in output, if there is one.")
    init_from: str | None = Field(
        None,
        description="Checkpoint whose weights (not optimizer state) a new run starts from, e.g. an imported model.",
    )


class LogConfig(_Section):
    """What is shown and recorded."""

    every: int = Field(1, gt=0, description="Steps between lines and TensorBoard points.")
    tensorboard: bool = Field(True, description="Write TensorBoard events to output/tensorboard.")
    progress: bool = Field(True, description="Show a progress bar.")
    record_steps: tuple[int, ...] = Field(
        (),
        description="Steps whose pipeline timeline is recorded to output/timeline for tools/show_schedule.py.",
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="Peak of one device for MFU. Default: a table of known GPUs; else no MFU."
    )


class RunConfig(_Section):
    """Pretrain a GPT-style model on any mesh of ranks."""

    output: str = Field(
        "runs/gpt", description="Directory of checkpoints, logs and the resolved configuration."
    )
    seed: int = Field(1234, ge=0, description="Initial weights, sample order and dropout follow from it.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: CUDA where every local rank has a GPU."
    )
    compile: bool = Field(False, description="torch.compile each block.")
    threads: int | None = Field(None, gt=0, description="CPU threads a rank. Default: cores / local ranks.")
    timeout: float = Field(
        600.0, gt=0, description="Seconds a collective may take before the job is stopped."
    )
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()
    zero: ZeroConfig = ZeroConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """Hash of every setting: ranks compare it before their first collective."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


C = TypeVar("C", bound=BaseModel)


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def from_dict(config_class: type[C], values: dict[str, Any], source: str) -> C:
    """Build a configuration from nested plain values; ConfigError names the dotted key, the value and the rule."""
    try:
        return config_class.model_validate(values)
    except pydantic.ValidationError as invalid:
        known = _known_keys(config_class)
        lines = []
        for error in invalid.errors():
            key = ".".join(str(part) for part in error["loc"])
            if error["type"] == "extra_forbidden":
                lines.append(f"unknown key {key!r}{nearest(key, known)}")
            else:
                lines.append(f"{key} = {error['input']!r}: {error['msg']}")
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def load_toml(path: str | Path) -> RunConfig:
    """The configuration of a TOML file; keys left out have their defaults."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except tomllib.TOMLDecodeError as invalid:
        raise ConfigError(f"--config {path}: not valid TOML: {invalid}") from None
    return from_dict(RunConfig, values, str(path))


def parse(arguments: Sequence[str] | None = None, description: str | None = None) -> RunConfig:
    """The configuration of ``[--config FILE] [--dotted.key value ...]``; later overrides win.

    ``--help`` shows each field with its meaning and its value after the file was read.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    default = RunConfig()
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise ConfigError("--config needs a file name, e.g. --config examples/configs/gpt2-345m.toml")
        default = load_toml(rest[at + 1])
        del rest[at : at + 2]
    _reject_unknown_flags(rest)
    try:
        return tyro.cli(RunConfig, args=rest, default=default, description=description)
    except pydantic.ValidationError as invalid:
        error = invalid.errors()[0]
        key = ".".join(str(part) for part in error["loc"])
        raise ConfigError(f"command line: {key} = {error['input']!r}: {error['msg']}") from None


def _reject_unknown_flags(arguments: Sequence[str]) -> None:
    known = {key.replace("_", "-") for key in _known_keys(RunConfig)}
    known |= {_negated(key) for key in known} | {"help"}
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument[2:].split("=")[0].replace("_", "-")
            if flag not in known:
                hint = nearest(flag, known).replace("'", "'--", 1)
                raise ConfigError(f"command line: unknown option --{flag}{hint}")


def _negated(key: str) -> str:
    head, _, last = key.rpartition(".")
    return f"{head}.no-{last}" if head else f"no-{last}"


def validate(config: RunConfig, world_size: int) -> MeshShape:
    """The one pass over everything that has to fit together. Returns the mesh; raises ConfigError with all faults.

    Runs before any process group exists and depends on the configuration and the world size alone, so that every
    rank comes to the same verdict.
    """
    m, mesh, train = config.model, config.mesh, config.train
    shape = MeshShape.for_world(world_size, pp=mesh.pp, cp=mesh.cp, tp=mesh.tp, dp=mesh.dp)
    faults: list[str] = []

    def check(fine: bool, message: str) -> None:
        if not fine:
            faults.append(message)

    check(mesh.cp == 1, f"mesh.cp={mesh.cp}: context parallelism is not built yet; use mesh.cp=1")
    check(
        m.num_heads % m.groups == 0,
        f"model.num_heads={m.num_heads} is not a multiple of model.kv_heads={m.groups}; "
        f"kv_heads may be {divisors(m.num_heads)}",
    )
    check(
        m.head_dim is not None or m.hidden_size % m.num_heads == 0,
        f"model.hidden_size={m.hidden_size} is not a multiple of model.num_heads={m.num_heads}; "
        f"use {_around(m.hidden_size, m.num_heads)}, or set model.head_dim",
    )
    check(
        m.groups % mesh.tp == 0,
        f"model.kv_heads={m.groups} cannot be split over mesh.tp={mesh.tp}; tp may be {divisors(m.groups)}",
    )
    check(
        m.ffn_size % mesh.tp == 0,
        f"model.ffn_hidden_size={m.ffn_size} cannot be split over mesh.tp={mesh.tp}; "
        f"use {_around(m.ffn_size, mesh.tp)}",
    )
    check(
        m.padded_vocab % mesh.tp == 0,
        f"the vocabulary padded to {m.padded_vocab} (model.vocab_size={m.vocab_size}, "
        f"model.vocab_multiple={m.vocab_multiple}) cannot be split over mesh.tp={mesh.tp}; "
        f"use model.vocab_multiple={math.lcm(m.vocab_multiple, mesh.tp)}",
    )
    check(
        m.position != "rope" or m.head_size % 2 == 0,
        f"rotary positions need an even head_dim, not {m.head_size}",
    )
    if m.rope_scaling is not None:
        needed = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        check(
            needed <= set(m.rope_scaling),
            f"model.rope_scaling={m.rope_scaling} lacks {sorted(needed - set(m.rope_scaling))}",
        )
    check(
        m.position != "learned" or train.sequence_length <= m.max_positions,
        f"train.sequence_length={train.sequence_length} is longer than model.max_positions={m.max_positions}; "
        "raise max_positions or shorten the sequence",
    )
    check(
        not (mesh.sequence_parallel and mesh.tp > 1) or train.sequence_length % mesh.tp == 0,
        f"train.sequence_length={train.sequence_length} cannot be split over mesh.tp={mesh.tp} for sequence "
        f"parallelism; use {_around(train.sequence_length, mesh.tp)}, or --mesh.no-sequence-parallel",
    )
    check(
        m.num_layers >= mesh.pp,
        f"model.num_layers={m.num_layers} cannot fill mesh.pp={mesh.pp} stages; use pp <= {m.num_layers}",
    )
    stages = config.pipeline.layers_per_stage
    if stages is not None:
        check(
            len(stages) == mesh.pp and sum(stages) == m.num_layers and min(stages, default=0) > 0,
            f"pipeline.layers_per_stage={list(stages)} must be {mesh.pp} positive numbers (mesh.pp) with the sum "
            f"{m.num_layers} (model.num_layers); it has {len(stages)} with the sum {sum(stages)}",
        )
    portion = train.micro_batch * shape.dp
    check(
        train.global_batch % portion == 0,
        f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch={train.micro_batch} x "
        f"dp={shape.dp} = {portion} (dp is world_size={world_size} / model-parallel {world_size // shape.dp}); "
        f"use {_around(train.global_batch, portion)}",
    )
    check(
        config.optimizer.warmup_steps <= (config.optimizer.decay_steps or train.steps),
        f"optimizer.warmup_steps={config.optimizer.warmup_steps} is more than the "
        f"{config.optimizer.decay_steps or train.steps} steps of the schedule",
    )
    check(
        config.optimizer.min_lr <= config.optimizer.lr,
        f"optimizer.min_lr={config.optimizer.min_lr} is above optimizer.lr={config.optimizer.lr}",
    )
    check(
        config.precision.dtype == "fp16" or config.precision.loss_scale is None,
        f"precision.loss_scale={config.precision.loss_scale} is for fp16; precision.dtype is {config.precision.dtype}",
    )
    check(
        config.data.synthetic or config.data.prefix is not None,
        "data.prefix is not set: give the path of a .bin/.idx pair without its suffix (tools/preprocess_data.py "
        "makes one), or --data.synthetic",
    )
    if faults:
        raise ConfigError(
            "\n".join(faults) if len(faults) == 1 else "".join(f"\n  - {fault}" for fault in faults)
        )
    return shape


def divisors(number: int) -> str:
    """``1, 2, 4 or 8``: what may divide ``number``, for an error message."""
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]


def _around(number: int, step: int) -> str:
    below, above = number // step * step, -(-number // step) * step
    return f"{below} or {above}" if below else str(above)


def to_toml(config: RunConfig) -> str:
    """The configuration as a TOML file that reads back to the same values; unset optional keys are left out."""
    values = config.to_dict()
    lines = [
        f"{key} = {_toml(value)}"
        for key, value in values.items()
        if value is not None and not isinstance(value, dict)
    ]
    for section, fields in values.items():
        if isinstance(fields, dict):
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in fields.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)
