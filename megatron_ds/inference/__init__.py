"""Text generation: a paged key/value cache, continuous batching, tensor and pipeline parallelism.

A request's way through the modules: ``openai_server`` takes it and ``openai_protocol`` reads it, as ``SamplingParams``
(``sampling_params``) and tokens (``texts``); or ``llm`` has them from its caller. ``serving_engine`` makes steps:
``batching`` chooses tokens for one and blocks (``block_pool``) for them, ``model_runner`` computes it over
``paged_cache``, ``sampler`` draws the next tokens. ``detokenizer`` makes text of them, ``outputs`` hands it back and
``openai_answers`` writes it for the client. ``serving_options`` says what can be set, ``served_model`` reads a model
and ``serving_recipes`` chooses how its layers multiply.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ds.inference.llm import LLM
    from megatron_ds.inference.outputs import CompletionOutput, RequestOutput
    from megatron_ds.inference.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
_HOMES = {"LLM": "llm", "CompletionOutput": "outputs", "RequestOutput": "outputs", "SamplingParams": "sampling_params"}


def __getattr__(name: str) -> Any:
    """Imported when they are asked for: ``megatron-ds serve --help`` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
