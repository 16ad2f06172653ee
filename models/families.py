"""The models by the name of their family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megatron_ds.config import ModelConfig, RunConfig
from megatron_ds.models.bert import BERTTask
from megatron_ds.models.gpt import GPTTask
from megatron_ds.models.text_task import TextTask
from megatron_ds.models.transformer import StageSettings, Transformer
from megatron_ds.shard import spec_of

Shapes = dict[str, tuple[int, ...]]

_TASKS: Mapping[str, type[TextTask]] = MappingProxyType({"gpt": GPTTask, "bert": BERTTask})


def class_of(config: ModelConfig) -> type[Transformer]:
    return _TASKS[config.family].stage


def global_shapes(config: ModelConfig) -> Shapes:
    """Name to global shape of every tensor of the model."""
    specs = [spec_of(parameter) for parameter in class_of(config)(config, StageSettings(device="meta")).parameters()]
    return {spec.name: spec.global_shape for spec in specs}


def task_of(config: RunConfig) -> TextTask:
    """What the model that ``config.model`` describes is to the trainer."""
    return _TASKS[config.model.family](config)
