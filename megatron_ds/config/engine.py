"""The settings of ``megatron_ds.initialize()``: pretraining's sections, and what a user's own model needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_ds.config.schema import OptimizerConfig, PrecisionConfig, Section, ZeroConfig
from megatron_ds.config.unused import ENGINE, unused_faults
from megatron_ds.config.zero import zero_faults
from megatron_ds.errors import ConfigError, itemised, multiples_around

# The optimizer section's other defaults here: whoever brings a model and a loop expects what plain torch does.
_PLAIN: dict[str, Any] = {"schedule": "constant", "clip_norm": 0.0}
# What of that section is no update rule's: it holds for an optimizer that the caller brings, too.
_OF_NO_RULE = {"clip_norm", "ema_decay", "ema_warmup"}


class DeepSpeedSchedule(Section):
    """The learning rate that DeepSpeed's scheduler of that name gives, update by update."""

    name: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"] = Field(
        description="A warm-up, then constant, linear or cosine; one cycle up and down, then a decay; or ever larger."
    )
    warmup_num_steps: int = Field(1000, gt=0, description="Warmup*: updates of warm-up.")
    warmup_type: Literal["log", "linear"] = Field("log", description="Warmup*: shape of the warm-up.")
    warmup_min_lr: float = Field(0.0, ge=0, description="WarmupLR, WarmupDecayLR: where the warm-up starts.")
    warmup_max_lr: float | None = Field(
        None, ge=0, description="Where it ends. Default: the optimizer's rate for WarmupLR, 0.001 for WarmupDecayLR."
    )
    total_num_steps: int | None = Field(None, gt=0, description="WarmupDecayLR, WarmupCosineLR: updates of the run.")
    warmup_min_ratio: float = Field(0.0, ge=0, description="WarmupCosineLR: start of the warm-up, of the rate.")
    cos_min_ratio: float = Field(0.0001, ge=0, description="WarmupCosineLR: end of the decay, of the rate.")
    cycle_min_lr: float | None = Field(None, ge=0, description="OneCycle: start and end of the cycle.")
    cycle_max_lr: float | None = Field(None, ge=0, description="OneCycle: its top.")
    cycle_first_step_size: int = Field(2000, gt=0, description="OneCycle: updates on the way up.")
    cycle_second_step_size: int | None = Field(None, ge=0, description="OneCycle: and down. Default: as many.")
    cycle_first_stair_count: int = Field(0, ge=0, description="OneCycle: stairs on the way up; 0 for a slope.")
    cycle_second_stair_count: int | None = Field(None, ge=0, description="OneCycle: and down. Default: as many.")
    decay_step_size: int = Field(0, ge=0, description="OneCycle: updates of one decay after the cycle; 0 for none.")
    decay_lr_rate: float = Field(0.0, ge=0, description="OneCycle: the rate is divided by 1 + this, a decay.")
    cycle_momentum: bool = Field(True, description="OneCycle: an optimizer's beta1 goes the other way; beta2 is 0.99.")
    cycle_min_mom: float = Field(0.8, ge=0, lt=1, description="OneCycle: beta1 at the top.")
    cycle_max_mom: float = Field(0.9, ge=0, lt=1, description="OneCycle: beta1 at the start and end of the cycle.")
    decay_mom_rate: float = Field(0.0, ge=0, description="OneCycle: beta1 is multiplied by 1 + this, a decay.")
    lr_range_test_min_lr: float = Field(0.001, ge=0, description="LRRangeTest: the first rate.")
    lr_range_test_step_size: int = Field(2000, gt=0, description="LRRangeTest: updates of one rise.")
    lr_range_test_step_rate: float = Field(1.0, ge=0, description="LRRangeTest: a rise, of the first rate.")
    lr_range_test_staircase: bool = Field(False, description="LRRangeTest: rise at once, not little by little.")

    @property
    def sets_betas(self) -> bool:
        return self.name == "OneCycle" and self.cycle_momentum


class TorchOptimizerConfig(Section):
    """An optimizer of ``torch.optim`` by name, instead of the optimizer section's."""

    name: str = Field(description="Class in torch.optim; not LBFGS, SparseAdam or Adafactor.")
    params: dict[str, Any] = Field({}, description="Keyword arguments of the class; they apply to every parameter.")


class EngineLogConfig(Section):
    """What rank 0 prints."""

    every: int = Field(0, ge=0, description="Steps between lines with loss, learning rate and speed; 0 for none.")
    breakdown: bool = Field(False, description="Seconds of forward, backward and step in those lines.")


class EngineConfig(Section):
    """Train any ``nn.Module`` with ZeRO."""

    micro_batch: int | None = Field(None, gt=0, description="Samples a forward pass on one rank.")
    accumulation: int | None = Field(None, gt=0, description="Micro-batches an optimizer step on one rank. Default: 1.")
    global_batch: int | None = Field(
        None, gt=0, description="Samples an optimizer step: micro_batch x accumulation x ranks. Any two give the third."
    )
    losses: Literal["mean", "sum"] = Field(
        "mean",
        description="mean: gradients are averaged over a step's micro-batches. sum: they add up, for losses that were "
        "divided by the accumulation, or by the tokens of the whole batch, already. Over ranks they are averaged.",
    )
    steps: int | None = Field(None, gt=0, description="Optimizer steps of the run, for a schedule that decays.")
    seed: int = Field(
        1234, ge=0, description="Of initial weights of a model built on the meta device, and of stochastic rounding."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where every local rank has a GPU.")
    timeout: float = Field(600.0, gt=0, description="Seconds a collective may take.")
    decay: Literal["matrices", "all"] = Field(
        "matrices", description="What optimizer.weight_decay applies to: all but biases and norms, or every parameter."
    )
    keep_freed_memory: bool = Field(
        False,
        description="On a CPU: the C library of this process keeps the memory of freed tensors for the next ones, "
        "which spares up to a tenth of a step's time. It stays so after training.",
    )
    cast_inputs: bool = Field(False, description="Floating-point inputs of forward() are cast to precision.dtype.")
    zero: ZeroConfig = ZeroConfig()
    optimizer: OptimizerConfig = OptimizerConfig(**_PLAIN)
    torch_optimizer: TorchOptimizerConfig | None = None
    schedule: DeepSpeedSchedule | None = None
    precision: PrecisionConfig = PrecisionConfig()
    log: EngineLogConfig = EngineLogConfig()

    @field_validator("optimizer", mode="before")
    @classmethod
    def _plain_defaults(cls, value: Any) -> Any:
        if isinstance(value, OptimizerConfig):
            value = value.model_dump(exclude_unset=True)
        return {**_PLAIN, **value} if isinstance(value, dict) else value

    @property
    def keeps_dtype(self) -> bool:
        """precision.dtype was not set: the model stays in the dtype it came in."""
        return "dtype" not in self.precision.model_fields_set

    def optimizer_settings(self) -> list[str]:
        """Settings of an update rule that were made: they contradict an optimizer that the caller brings."""
        given = sorted(self.optimizer.model_fields_set - _OF_NO_RULE)
        return [f"optimizer.{name}" for name in given if getattr(self.optimizer, name) != _PLAIN.get(name)]

    @property
    def has_optimizer(self) -> bool:
        return bool(self.optimizer_settings()) or self.torch_optimizer is not None

    def without_optimizer(self) -> EngineConfig:
        """The same for an optimizer that the caller makes: clipping and the average of the weights stay."""
        kept = self.optimizer.model_dump(include=_OF_NO_RULE, exclude_unset=True)
        plain = OptimizerConfig(**{**_PLAIN, **kept})
        return self.model_copy(update={"optimizer": plain, "torch_optimizer": None})


@dataclass(frozen=True)
class BatchSizes:
    """Samples an optimizer step, samples a micro-batch (None: never said), micro-batches a step on one rank."""

    global_batch: int | None
    micro_batch: int | None
    accumulation: int


def batch_sizes(config: EngineConfig, dp: int) -> BatchSizes:
    """The three sizes for ``dp`` data-parallel ranks, those left out derived from the others.

    Raises:
        ConfigError: they do not multiply; with the numbers and the nearest that do.
    """
    whole, micro, steps = config.global_batch, config.micro_batch, config.accumulation
    if whole is None:
        return BatchSizes(None if micro is None else micro * (steps or 1) * dp, micro, steps or 1)
    if micro is None:
        known, name = (steps or 1) * dp, f"accumulation={steps or 1} x dp={dp}"
    elif steps is None:
        known, name = micro * dp, f"micro_batch={micro} x dp={dp}"
    else:
        known, name = micro * steps * dp, f"micro_batch={micro} x accumulation={steps} x dp={dp}"
        if whole != known:
            raise ConfigError(
                f"global_batch={whole} is not {name} = {known}; use global_batch={known}, or leave one of the three "
                f"unset{_nearest_accumulation(whole, micro * dp)}"
            )
    if whole % known:
        legal = multiples_around(whole, known)
        raise ConfigError(f"global_batch={whole} is not a multiple of {name} = {known}; use {legal}")
    if micro is None:
        return BatchSizes(whole, whole // known, steps or 1)
    return BatchSizes(whole, micro, steps or whole // known)


def _nearest_accumulation(whole: int, portion: int) -> str:
    return f" (accumulation={whole // portion} would make it {whole})" if whole % portion == 0 else ""


def engine_faults(config: EngineConfig, dp: int) -> Iterator[str]:
    """What does not fit together; a setting that would do nothing counts."""
    yield from zero_faults(config.zero, dp)
    if config.optimizer.name == "muon":
        yield (
            "optimizer.name='muon' knows the matrices of this library's own models; give torch.optim.Muon over those "
            "of yours to initialize(optimizer=...)"
        )
    if config.precision.fp8 != "none":
        yield (
            f"precision.fp8={config.precision.fp8!r} is for the linear layers of this library's own models; leave it "
            "out, or train the model by examples/pretrain_gpt.py"
        )
    yield from unused_faults(config, ENGINE)
    section = config.optimizer
    yield from section.faults(config.steps)
    if config.torch_optimizer is not None and (given := config.optimizer_settings()):
        yield (
            f"torch_optimizer.name={config.torch_optimizer.name!r} and {', '.join(given)} are two optimizers; "
            "use torch_optimizer.params"
        )
    decays = section.schedule in ("cosine", "linear", "wsd")
    if config.schedule is None and decays and section.decay_steps is None and config.steps is None:
        yield (
            f"optimizer.schedule={section.schedule!r} decays to the end of the run, which is not known; "
            "set steps or optimizer.decay_steps"
        )
    schedule = config.schedule
    if schedule is not None:
        if "schedule" in section.model_fields_set and section.schedule != "constant":
            yield f"schedule.name={schedule.name!r} and optimizer.schedule={section.schedule!r}; use one of them"
        yield from _schedule_faults(schedule)


def _schedule_faults(schedule: DeepSpeedSchedule) -> Iterator[str]:
    total = schedule.total_num_steps
    if schedule.name in ("WarmupDecayLR", "WarmupCosineLR"):
        if total is None:
            yield f"schedule.name={schedule.name!r} needs schedule.total_num_steps, the updates of the run"
        elif total < schedule.warmup_num_steps:
            yield (
                f"schedule.total_num_steps={total} is less than schedule.warmup_num_steps={schedule.warmup_num_steps}"
            )
    if schedule.name == "OneCycle":
        for bound in ("cycle_min_lr", "cycle_max_lr"):
            if getattr(schedule, bound) is None:
                yield f"schedule.name='OneCycle' needs schedule.{bound}"


def validate_engine(config: EngineConfig, dp: int) -> BatchSizes:
    """The one pass over everything that has to fit together; ConfigError with all faults."""
    faults = list(engine_faults(config, dp))
    sizes = BatchSizes(None, None, 1)
    try:
        sizes = batch_sizes(config, dp)
    except ConfigError as error:
        faults.append(str(error))
    if faults:
        raise ConfigError(itemised(faults))
    return sizes
