"""The models by the name of their family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from megatron_ds.config import ModelConfig, RunConfig
from megatron_ds.models.bert import BERT, bert_model
from megatron_ds.models.gpt import GPT, gpt_model
from megatron_ds.models.transformer import Transformer
from megatron_ds.pipeline.stage import Model

_CLASSES: Mapping[str, type[Transformer]] = MappingProxyType({"gpt": GPT, "bert": BERT})
_MODELS: Mapping[str, Callable[[RunConfig], Model]] = MappingProxyType({"gpt": gpt_model, "bert": bert_model})


def class_of(config: ModelConfig) -> type[Transformer]:
    return _CLASSES[config.family]


def model_of(config: RunConfig) -> Model:
    """What training needs of the model that ``config.model`` describes."""
    return _MODELS[config.model.family](config)
