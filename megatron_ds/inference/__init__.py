"""Text generation: a paged key/value cache, continuous batching, tensor and pipeline parallelism."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ds.inference.llm import LLM
    from megatron_ds.inference.outputs import CompletionOutput, RequestOutput
    from megatron_ds.inference.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
_HOMES = (
    ("LLM", "llm"),
    ("CompletionOutput", "outputs"),
    ("RequestOutput", "outputs"),
    ("SamplingParams", "sampling_params"),
)


def __getattr__(name: str) -> Any:
    """Imported when they are asked for: ``megatron-ds serve --help`` needs no torch."""
    for public, home in _HOMES:
        if public == name:
            return getattr(importlib.import_module(f"megatron_ds.inference.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
