"""The sections that every run has, whatever it trains: each field with its meaning, unit and default."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from megatron_ds.mesh import MOST_RANKS, MeshShape

Count = Annotated[int, Field(gt=0)]
_MOST = 1 << 53  # a whole number that a float and JSON still hold exactly
MOST_LAYERS = 1 << 16  # and heads: what is made one by one


class Section(BaseModel):
    """A section of settings. Every value is of its field's type (no true for 1, no "3" for 3), every number finite and
    every text something that can name a file: one rule, for all sections, files and command lines."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return value  # it checks its own
        if isinstance(value, bool) and get_origin(kind) is Literal and not any(v is value for v in get_args(kind)):
            raise ValueError(f"Input should be {' or '.join(map(repr, get_args(kind)))}")
        return _checked(value)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, as JSON has them."""
        return self.model_dump(mode="json")


def _checked(value: Any) -> Any:
    """The value, its lists as tuples; an error for a number or a text in it that can mean nothing."""
    if isinstance(value, list | tuple):
        return tuple(_checked(item) for item in value)
    if isinstance(value, dict):
        return {name: _checked(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("Input should be a finite number")
    if isinstance(value, int) and abs(value) > _MOST:
        raise ValueError("Input should be at most 2^53 in size")
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("Input should not be empty" if not value else "Input should not contain a NUL character")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("Input should be valid Unicode; a path of other letters needs a locale like LC_ALL=C.UTF-8")
    return value


class BaseModelConfig(Section):
    """What every model says of itself; a family adds its own settings."""

    num_layers: int = Field(12, gt=0, le=MOST_LAYERS, description="Layers (blocks), which pipeline stages share out.")

    @property
    def resolved(self) -> dict[str, Any]:
        """The settings, with the values that their defaults stand for."""
        return self.to_dict()

    @property
    def free(self) -> frozenset[str]:
        """Settings that no weight depends on: a run that starts from another's weights may choose them anew."""
        return frozenset()

    @property
    def growing(self) -> Mapping[str, str]:
        """Settings that may be larger than those of the weights that a run starts from, with what is new then."""
        return {}


class MeshConfig(Section):
    """How many ranks along each axis; tp is kept inside a node."""

    tp: int = Field(1, gt=0, le=MOST_RANKS, description="Tensor-parallel ranks, which share each layer's matrices.")
    pp: int = Field(1, gt=0, le=MOST_RANKS, description="Pipeline stages: the layers are split over them.")
    cp: int = Field(1, gt=0, le=MOST_RANKS, description="Context-parallel ranks; only 1 for now.")
    dp: int | None = Field(
        None, gt=0, le=MOST_RANKS, description="Data-parallel replicas. Default: what the world size leaves."
    )
    sequence_parallel: bool = Field(
        True, description="Outside tensor-parallel layers split activations along the sequence over tp."
    )


class PipelineConfig(Section):
    """When a stage does what."""

    schedule: Literal["1f1b", "gpipe"] = Field("1f1b", description="Order of forwards and backwards.")
    chunks: int = Field(1, gt=0, description="Stages (model chunks) a rank holds; above 1 with gpipe.")
    placement: Literal["looped", "v"] = Field(
        "looped", description="Where stages lie when a rank holds several: 0 1 2 0 1 2, or v: 0 1 2 2 1 0."
    )
    split: Literal["count", "cost"] = Field(
        "count", description="Layers a stage: evenly by count, or by cost with embedding and head counted."
    )
    layers_per_stage: tuple[Count, ...] | None = Field(None, description="Explicit split, e.g. 3 4 4 1, not split's.")


class OffloadConfig(Section):
    """Where a part of the sharded state lives between its uses."""

    device: Literal["none", "cpu", "nvme"] = Field(
        "none", description="none: on the device. cpu: in host memory. nvme: in swap files under path."
    )
    path: str | None = Field(None, description="nvme: folder for the swap files, on a local disk of each node.")
    ratio: float = Field(
        1.0, ge=0, le=1, description="Share of the state, by elements and whole buckets, that goes there."
    )
    pin_memory: bool = Field(True, description="Page-locked host memory, for faster copies; CUDA only.")


class ZeroConfig(Section):
    """Whose memory holds gradients, optimizer state and parameters."""

    stage: Literal[0, 1, 2, 3] = Field(
        1, description="Sharded over dp: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."
    )
    bucket_mb: float = Field(
        25.0, gt=0, description="MB of gradients reduced at a time, while the backward pass goes on."
    )
    overlap: bool = Field(
        True,
        description="Reduce buckets during the last backward pass, not after it; without it stages 2 and 3 keep whole "
        "gradients until its end.",
    )
    shard_size: int | None = Field(
        None, gt=0, description="Ranks over which state is sharded; beyond them it is repeated. Default: all of dp."
    )
    keep_whole: bool = Field(
        False,
        description="Stages 2, 3: whole gradients (and gathered weights) stay until the last micro-batch of a step.",
    )
    prefetch: int = Field(1, ge=0, description="Stage 3: units (blocks) gathered ahead of the one in use.")
    persistence_threshold: int = Field(
        10_000, ge=0, description="Stage 3: parameters with fewer elements than this stay whole on every rank."
    )
    quantized_weights: Literal["none", "int8", "fp8"] = Field(
        "none", description="Stage 3: weights are gathered in 8 bits by blocks of 256 (ZeRO++); masters stay exact."
    )
    quantized_gradients: Literal["none", "int8", "int4"] = Field(
        "none", description="Gradients are sent in 8 or 4 bits by blocks of 256 (ZeRO++), and summed in fp32."
    )
    quantized_stochastic: bool = Field(False, description="Round those gradients up or down by chance, without bias.")
    secondary_size: int | None = Field(
        None,
        gt=1,
        description="Ranks of a node: stage 3 gathers weights a second time from its shards alone (ZeRO++'s hpZ), and "
        "quantised gradients are summed in it first.",
    )
    offload_optimizer: OffloadConfig = OffloadConfig()
    offload_parameters: OffloadConfig = OffloadConfig()
    host_memory_mb: float | None = Field(
        None,
        gt=0,
        description="MB of host memory a rank that offload may take, staging buffers included. Default: what is free.",
    )


class OptimizerConfig(Section):
    """The update rule. Learning rates are per step."""

    name: Literal["adamw", "sgd", "muon"] = Field(
        "adamw",
        description="torch's fused AdamW, SGD with momentum, or Muon for the matrices of linear layers with AdamW "
        "for the rest.",
    )
    lr: float = Field(3e-4, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = Field(
        "cosine", description="Shape of the decay after warm-up; wsd is warm-up, stable, decay."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from 0.")
    decay_steps: int | None = Field(None, gt=0, description="Step at which min_lr is reached. Default: train.steps.")
    wsd_decay_fraction: float = Field(0.1, gt=0, le=1, description="Share of decay_steps that wsd spends decaying.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="AdamW's denominator offset.")
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD's momentum.")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum.")
    muon_nesterov: bool = Field(True, description="Muon's momentum is Nesterov's.")
    muon_steps: int = Field(5, gt=0, le=100, description="Muon's Newton-Schulz iterations.")
    muon_dtype: Literal["bf16", "fp32", "fp64"] = Field("bf16", description="Format of Muon's iterations.")
    muon_heads: bool = Field(False, description="Muon takes each head's queries, keys and values as one matrix.")
    muon_adjust: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw", description="Muon's update by a matrix's size: as large as AdamW's, or sqrt(rows / columns)."
    )
    weight_decay: float = Field(0.1, ge=0, description="Decay of matrices; biases and norms are never decayed.")
    clip_norm: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 turns clipping off.")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="Decay of an exponential moving average of the weights, kept beside them; 0: none."
    )
    ema_warmup: bool = Field(True, description="The average forgets early weights sooner: (1 + n) / (10 + n) at most.")

    def faults(self, steps: int | None) -> Iterator[str]:
        """What the learning rate cannot do in a run of so many steps, where they are known."""
        end = self.decay_steps or steps
        if end is not None and self.warmup_steps > end:
            yield f"optimizer.warmup_steps={self.warmup_steps} is more than the {end} steps of the schedule"
        if self.min_lr > self.lr:
            yield f"optimizer.min_lr={self.min_lr:g} is above optimizer.lr={self.lr:g}"


class PrecisionConfig(Section):
    """Number formats. Gradients are always accumulated and master weights kept in fp32 (fp64 for fp64)."""

    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = Field("fp32", description="Format of weights and activations.")
    loss_scale: float | None = Field(None, gt=0, le=2.0**40, description="Fixed fp16 loss scale. Default: dynamic.")
    initial_loss_scale: float = Field(65536.0, gt=0, le=2.0**40, description="Where the dynamic loss scale starts.")
    loss_scale_window: int = Field(1000, gt=0, description="Good steps before the scale doubles.")
    loss_scale_wait: int = Field(
        0, ge=0, description="Good steps at the start and after an overflow that the window does not count."
    )
    loss_scale_hysteresis: int = Field(2, gt=0, description="Overflowing steps before the scale halves.")
    min_loss_scale: float = Field(1.0, gt=0, le=2.0**40, description="The scale never falls below this.")
    fp8: Literal["none", "tensorwise", "rowwise", "blockwise"] = Field(
        "none",
        description="Products of linear layers in FP8: what shares a scale. The embedding, head and norms stay.",
    )
    fp8_gradients: Literal["e4m3", "e5m2"] | None = Field(
        None, description="FP8 format of output gradients. Default: e5m2 for tensorwise, e4m3 for the others."
    )
    fp8_weight_gradient: bool = Field(True, description="Weight gradients in FP8 too, else in precision.dtype.")
    fp8_from_masters: bool = Field(
        True, description="Weights are quantised from fp32 masters and gathered in FP8; else from half copies."
    )
    fp8_power_of_two: bool = Field(False, description="Scales are powers of two, so that scaling never rounds.")
    fp8_block: int = Field(128, gt=0, description="Side of a block of blockwise; CUDA has 128 alone.")
    fp8_min_features: int = Field(
        2048, ge=0, description="Layers with fewer input or output features stay: they gain nothing on a GPU."
    )
    fp8_exclude: tuple[str, ...] = Field(
        (), description="Patterns of layers that stay, such as layers.0.* or *.mlp.down."
    )
    fp8_emulate: bool = Field(False, description="Compute FP8 on a device without it, such as a CPU: slow, for tests.")


class RecomputeConfig(Section):
    """What the backward pass computes again instead of keeping."""

    mode: Literal["none", "selective", "full", "every_n"] = Field(
        "none", description="selective: the attention core; full: every block; every_n: every n-th block."
    )
    every: int = Field(2, gt=0, description="n of every_n.")

    def whole_block(self, index: int) -> bool:
        """Whether all of the block with this number is computed again."""
        every = {"full": 1, "every_n": self.every}.get(self.mode)
        return every is not None and index % every == 0


class BaseDataConfig(Section):
    """How samples are read; a family says where they come from."""

    prefetch: int = Field(2, ge=0, description="Global batches read ahead by a background thread.")
    changed: Literal["refuse", "accept"] = Field(
        "refuse", description="What a run does that is resumed and finds other data than it was trained on."
    )


class BaseTrainConfig(Section):
    """How much, and in what portions."""

    steps: int = Field(1000, gt=0, description="Optimizer steps of the whole run.")
    global_batch: int = Field(8, gt=0, description="Samples an optimizer step.")
    batch_ramp: tuple[Count, Count, Count] | None = Field(
        None,
        description="START INCREMENT SAMPLES: the batch grows from START to global_batch in equal parts of the first "
        "SAMPLES samples.",
    )
    micro_batch: int = Field(1, gt=0, description="Samples a forward pass on one replica.")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0 for none.")
    eval_batches: int = Field(8, gt=0, description="Global batches an evaluation.")
    check_replicas_every: int = Field(
        100,
        ge=0,
        description="Steps from one comparison of the weights that tensor-parallel ranks hold a copy of to the next, "
        "one small message; 0: none.",
    )
    max_skipped_steps: int = Field(
        50, gt=0, description="Consecutive steps skipped for NaN or Inf gradients before the run is stopped."
    )
    late_check: bool = Field(
        False,
        description="The host learns one step late whether gradients were finite, and waits for no step: the device "
        "skips by itself. Weights are the same.",
    )


class CheckpointConfig(Section):
    """What is written, when, and where a run starts from."""

    save_every: int = Field(0, ge=0, description="Steps between checkpoints; 0: only at the end.")
    save_at_end: bool = Field(True, description="Write a checkpoint after the last step.")
    keep_last: int | None = Field(
        None,
        gt=0,
        description="Older checkpoints are deleted, but for the newest that a good step followed. Default: keep all.",
    )
    resume: bool = Field(False, description="Continue from the latest checkpoint in output, if there is one.")
    resume_from: int | str | None = Field(
        None,
        description="Continue from another checkpoint, optimizer state and all: a step of output's, last-good (the "
        "newest of them whose every checksum is right), or a path.",
    )
    init_from: str | None = Field(
        None,
        description="Checkpoint of which a new run takes the weights (not the optimizer state) and the model's "
        "settings (a diffusion model's objective too), e.g. an imported model.",
    )


class LogConfig(Section):
    """What is shown and recorded."""

    every: int = Field(1, gt=0, description="Steps between lines and TensorBoard points.")
    tensorboard: bool = Field(True, description="Write TensorBoard events to output/tensorboard.")
    progress: bool = Field(
        True,
        description="Show a progress bar; into a file, a line every 10 s at most. Off: a line every log.every steps.",
    )
    record_steps: tuple[Count, ...] = Field(
        (),
        description="Steps whose pipeline timeline is recorded to output/timeline for tools/show_schedule.py.",
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="Peak of one device for MFU. Default: a table of known GPUs; else no MFU."
    )


class BaseRunConfig(Section):
    """What every run has. A family of models adds its own sections and says what has to fit together in them."""

    output: str = Field("runs/run", description="Directory of checkpoints, logs and the resolved configuration.")
    seed: int = Field(1234, ge=0, description="Initial weights, sample order and dropout follow from it.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where every local rank has a GPU.")
    compile: bool = Field(
        False,
        description="torch.compile each block, from plain operators, not fused kernels: more launches and bytes on a "
        "GPU; on a CPU its activation and adaLN.",
    )
    kernels: Literal["auto", "reference", "triton"] = Field(
        "auto", description="Fused ops: auto is Triton on CUDA (not in fp64); reference is plain torch."
    )
    threads: int | None = Field(None, gt=0, description="CPU threads a rank. Default: cores / local ranks.")
    timeout: float = Field(600.0, gt=0, description="Seconds a collective may take before the job is stopped.")
    model: BaseModelConfig
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()
    zero: ZeroConfig = ZeroConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    data: BaseDataConfig = BaseDataConfig()
    train: BaseTrainConfig = BaseTrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def fixed(self) -> frozenset[str]:
        """Sections and dotted settings that a run cannot change when it continues: what its weights mean."""
        return frozenset(("model", "seed"))

    def faults(self, shape: MeshShape, needs_data: bool) -> Iterator[str]:
        """What does not fit together in the family's own settings: a sentence each, with the way out."""
        yield from ()
