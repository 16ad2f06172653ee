"""The sections of a run that trains a diffusion transformer, and what has to fit together in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from megatron_ds.config.image_data import UNUSED as IMAGE_DATA_UNUSED
from megatron_ds.config.image_data import DiffusionDataConfig, image_data_faults
from megatron_ds.config.schema import BaseModelConfig, BaseRunConfig, BaseTrainConfig, Section
from megatron_ds.config.sparse import AttentionConfig, layout_faults, unused_parameters
from megatron_ds.config.unused import Unused, unused_faults
from megatron_ds.errors import divisors, multiples_around
from megatron_ds.mesh import MeshShape


class DiTConfig(BaseModelConfig):
    """A diffusion transformer with adaLN-Zero (Peebles and Xie 2023), told a class or a text (Esser et al. 2024)."""

    family: Literal["dit"] = "dit"
    hidden_size: int = Field(384, gt=0, description="Width of the tokens; a multiple of 4.")
    num_heads: int = Field(6, gt=0, description="Attention heads.")
    ffn_hidden_size: int | None = Field(None, gt=0, description="Width of the MLP. Default: 4 x hidden_size.")
    activation: Literal["gelu_tanh", "swiglu"] = Field("gelu_tanh", description="Of the MLPs.")
    qk_norm: bool = Field(False, description="RMSNorm of the queries and keys of each head.")
    attention: AttentionConfig = AttentionConfig()
    image_size: int = Field(
        32, gt=0, description="Height and width of the images, or of their latents; of buckets, the usual one."
    )
    channels: int = Field(4, gt=0, description="Channels of the images, or of their latents.")
    learned_variance: bool = Field(
        False, description="Predict the variance of each step too, from twice the channels (Nichol and Dhariwal 2021)."
    )
    patch_size: int = Field(2, gt=0, description="Height and width of the patch that is one token.")
    positions: Literal["sines", "rope"] = Field(
        "sines",
        description="Sines of row and column added to the patches, or half of each head's planes turned by each.",
    )
    position_grid: int | None = Field(
        None,
        gt=0,
        description="Patches along a side of the largest grid, of which each image is the middle (Stable Diffusion 3). "
        "Default: positions of an image of another size are stretched to those of image_size.",
    )
    condition: Literal["class", "text"] = Field(
        "class", description="What the model is told: a class, or a text through joint blocks of two streams."
    )
    num_classes: int = Field(
        1000, gt=0, description="Classes. Row num_classes of the table is 'no class', which guidance needs."
    )
    text_size: int = Field(4096, gt=0, description="text: width of the embeddings of a text's tokens.")
    text_tokens: int = Field(154, gt=0, description="text: embeddings of a text.")
    pooled_size: int = Field(2048, gt=0, description="text: width of the one embedding of a whole text.")
    norm_eps: float = Field(1e-6, gt=0, description="Added to the variance before an MLP; in all other norms 1e-6 is.")
    init_std: float | None = Field(
        None,
        gt=0,
        description="Standard deviation of the blocks' initial weights. Default: Xavier's, hidden_size^-0.5.",
    )
    zero_init_std: float = Field(
        0.0, ge=0, description="Of the weights that adaLN-Zero starts at zero; above 0 for tests of gradients."
    )

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def has_text(self) -> bool:
        return self.condition == "text"

    @property
    def patches(self) -> int:
        """Of an image."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Positions that attention sees together: patches of an image, and the tokens of a text."""
        return self.patches + (self.text_tokens if self.has_text else 0)

    @property
    def patch_elements(self) -> int:
        """Numbers in a patch."""
        return self.patch_size**2 * self.channels

    @property
    def out_channels(self) -> int:
        """Channels of what is predicted."""
        return self.channels * (1 + self.learned_variance)

    @property
    def std(self) -> float:
        return self.init_std or self.hidden_size**-0.5

    @property
    def resolved(self) -> dict[str, Any]:
        return {**self.to_dict(), "ffn_hidden_size": self.ffn_size}

    @property
    def free(self) -> frozenset[str]:
        return frozenset(("init_std", "zero_init_std"))


class ObjectiveConfig(Section):
    """What the model predicts, at which noise levels, and how errors are weighted."""

    prediction: Literal["epsilon", "v", "x0", "flow"] = Field(
        "epsilon",
        description="The noise, the velocity of Salimans and Ho 2022, the image, or noise - image (rectified flow).",
    )
    schedule: Literal["linear", "scaled_linear", "cosine", "flow"] = Field(
        "linear",
        description="Noise by time: betas (or their roots) from beta_start to beta_end, a cosine, or for prediction "
        "flow the straight line.",
    )
    num_timesteps: int = Field(1000, gt=1, description="Steps of the noise schedule; what the model sees as time.")
    beta_start: float = Field(1e-4, gt=0, lt=1, description="First beta of the linear schedules.")
    beta_end: float = Field(0.02, gt=0, lt=1, description="Last beta of the linear schedules.")
    zero_terminal_snr: bool = Field(
        False, description="Rescale the schedule so that its last step is noise alone (Lin et al. 2024)."
    )
    density: Literal["uniform", "logit_normal"] = Field(
        "uniform", description="Of the training times; logit_normal (Esser et al. 2024) looks at the middle more."
    )
    logit_mean: float = Field(0.0, description="Mean of the logit of logit_normal times.")
    logit_std: float = Field(1.0, gt=0, description="Standard deviation of it.")
    shift: float = Field(1.0, gt=0, description="flow: times move to s t / (1 + (s - 1) t); above 1 to more noise.")
    shift_base_tokens: int | None = Field(
        None, gt=0, description="flow: multiply shift by sqrt(tokens / this): larger images need more noise."
    )
    min_snr: float | None = Field(
        None, gt=0, description="Weigh errors by the signal-to-noise ratio clamped at this (Hang et al. 2023); often 5."
    )
    vlb_weight: float = Field(
        0.001, gt=0, description="model.learned_variance: of the variational bound beside the squared error."
    )
    condition_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of samples trained without their class or text, for guidance."
    )

    @property
    def is_flow(self) -> bool:
        return self.schedule == "flow"


class DiffusionTrainConfig(BaseTrainConfig):
    """How much, and in what portions."""

    global_batch: int = Field(64, gt=0, description="Images an optimizer step.")
    micro_batch: int = Field(8, gt=0, description="Images a forward pass on one replica.")


class DiffusionRun(BaseRunConfig):
    """Train a diffusion transformer on any mesh of ranks."""

    output: str = Field("runs/dit", description="Directory of checkpoints, logs and the resolved configuration.")
    model: DiTConfig = DiTConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DiffusionDataConfig = DiffusionDataConfig()
    train: DiffusionTrainConfig = DiffusionTrainConfig()

    @property
    def fixed(self) -> frozenset[str]:
        names = ("prediction", "schedule", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr")
        return super().fixed | {f"objective.{name}" for name in names}

    def faults(self, shape: MeshShape, needs_data: bool) -> Iterator[str]:
        yield from _model_faults(self, shape.tp)
        yield from _objective_faults(self.objective)
        yield from unused_faults(self, _UNUSED)
        yield from image_data_faults(self)


_UNUSED = (
    Unused(
        ("objective.logit_mean", "objective.logit_std"),
        lambda c: c.objective.density == "logit_normal",
        "objective.density={c.objective.density!r}; use 'logit_normal'",
    ),
    Unused(
        ("objective.shift", "objective.shift_base_tokens"),
        lambda c: c.objective.is_flow,
        "objective.schedule={c.objective.schedule!r} is not shifted; use 'flow'",
    ),
    Unused(
        ("objective.beta_start", "objective.beta_end"),
        lambda c: c.objective.schedule in ("linear", "scaled_linear"),
        "objective.schedule={c.objective.schedule!r} has no betas of its own; use 'linear' or 'scaled_linear'",
    ),
    Unused(
        ("objective.zero_terminal_snr",),
        lambda c: not c.objective.is_flow,
        "objective.schedule='flow' ends in noise alone anyway",
    ),
    Unused(
        ("model.num_classes",),
        lambda c: not c.model.has_text,
        "model.condition='text' has no classes; use model.condition='class'",
    ),
    Unused(
        ("model.text_size", "model.text_tokens", "model.pooled_size"),
        lambda c: c.model.has_text,
        "model.condition='class' sees no text; use model.condition='text'",
    ),
    Unused(
        ("objective.vlb_weight",),
        lambda c: c.model.learned_variance,
        "no variances are learned; set model.learned_variance",
    ),
    Unused(
        ("model.position_grid",),
        lambda c: c.model.positions == "sines",
        "model.positions='rope' counts from the image's corner; use model.positions='sines'",
    ),
    *IMAGE_DATA_UNUSED,
)


def _model_faults(run: DiffusionRun, tp: int) -> Iterator[str]:
    m = run.model
    if m.learned_variance and run.objective.is_flow:
        yield (
            "model.learned_variance with objective.schedule='flow': the steps of rectified flow have no variances; "
            "leave it out, or use another schedule"
        )
    yield from unused_parameters(m.attention.sparse)
    yield from image_faults(run, m.image_size, m.image_size, tp)
    if m.hidden_size % m.num_heads:
        yield (
            f"model.hidden_size={m.hidden_size} is not a multiple of model.num_heads={m.num_heads}; use "
            f"{multiples_around(m.hidden_size, m.num_heads)}"
        )
    if m.hidden_size % 4:
        yield (
            f"model.hidden_size={m.hidden_size} is not a multiple of 4, a sine and a cosine of each of two positions; "
            f"use {multiples_around(m.hidden_size, 4)}"
        )
    if m.positions == "rope" and not m.hidden_size % m.num_heads and m.head_size % 4:
        yield (
            f"model.positions='rope' with heads of {m.head_size}: planes of two dims turn by row and as many by column;"
            f" use a model.num_heads that makes them a multiple of 4, or model.positions='sines'"
        )
    if run.mesh.sequence_parallel and tp > 1 and m.has_text and m.text_tokens % tp:
        yield (
            f"model.text_tokens={m.text_tokens} cannot be split over mesh.tp={tp} for sequence parallelism; use "
            f"{multiples_around(m.text_tokens, tp)}, or --mesh.no-sequence-parallel"
        )
    if m.has_text and run.data.source == "digits":
        yield "data.source='digits' has classes and no texts; use model.condition='class', or data.source='synthetic'"
    if m.num_heads % tp:
        yield (f"model.num_heads={m.num_heads} cannot be split over mesh.tp={tp}; tp may be {divisors(m.num_heads)}")
    for name, size in (("hidden_size", m.hidden_size), ("ffn_hidden_size", m.ffn_size)):
        if size % tp:
            yield f"model.{name}={size} cannot be split over mesh.tp={tp}; use {multiples_around(size, tp)}"


def image_faults(run: DiffusionRun, height: int, width: int, tp: int) -> Iterator[str]:
    """Why the model cannot be trained on images, or latents, of this size."""
    m = run.model
    named = f"model.image_size={height}" if height == width == m.image_size else f"images of {height} x {width}"
    for size in dict.fromkeys((height, width)):
        if size % m.patch_size:
            yield (
                f"{named}: {size} is not a multiple of model.patch_size={m.patch_size}; patch_size may be "
                f"{divisors(size)}"
            )
        if m.position_grid is not None and size // m.patch_size > m.position_grid:
            yield (
                f"{named} has {size // m.patch_size} patches along a side, more than model.position_grid="
                f"{m.position_grid}; raise that, or leave it out"
            )
    tokens = (height // m.patch_size) * (width // m.patch_size)
    if m.attention.sparse.mode != "none":
        length = tokens + m.text_tokens * m.has_text
        beside = f" beside {m.text_tokens} tokens of text" if m.has_text else ""
        what = f"a sequence of {length} ({tokens} patches of {named}{beside})"
        yield from layout_faults(m.attention.sparse, length, m.num_heads, False, what)
    if run.mesh.sequence_parallel and tp > 1 and tokens % tp:
        yield (
            f"the {tokens} patches of an image ({named}) cannot be split over mesh.tp={tp} for sequence parallelism; "
            "use another model.patch_size, or --mesh.no-sequence-parallel"
        )


def _objective_faults(o: ObjectiveConfig) -> Iterator[str]:
    if (o.prediction == "flow") != o.is_flow:
        way = "schedule='flow'" if o.prediction == "flow" else "prediction='flow'"
        yield (
            f"objective.prediction={o.prediction!r} with objective.schedule={o.schedule!r}: rectified flow predicts "
            f"the velocity of its own schedule; use objective.{way}, or another of both"
        )
    if o.schedule in ("linear", "scaled_linear") and o.beta_start >= o.beta_end:
        yield f"objective.beta_start={o.beta_start} is not below objective.beta_end={o.beta_end}; betas grow with time"
    if o.zero_terminal_snr and o.prediction == "epsilon":
        yield (
            "objective.zero_terminal_snr with objective.prediction='epsilon': of noise alone the noise says nothing "
            "about the image; use 'v' or 'x0'"
        )
