"""Options of a served model: the arguments of ``LLM(...)`` and the flags of ``megatron-ds serve``."""

from __future__ import annotations

from dataclasses import KW_ONLY, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_ds.errors import ConfigError
from megatron_ds.inference.checked_settings import CheckedSettings

Scheme = Literal["int8", "w8a8", "fp8", "int4"]
"""Of weights in fewer bits: see :mod:`megatron_ds.inference.quantization`."""
AnyPath = str | Path
_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0.0)]


@dataclass(frozen=True)
class EngineOptions(CheckedSettings):
    """How a model is served."""

    model: tyro.conf.Positional[Annotated[AnyPath, tyro.conf.arg(metavar="FOLDER")]]
    """A run's checkpoint directory, one step's directory, or a folder of transformers."""
    _: KW_ONLY
    tokenizer: AnyPath | None = None
    """Where the tokenizer is, if not with the model."""
    tensor_parallel_size: _Count = 1
    """Ranks that every layer's weights are split over. The first one starts the others, unless torchrun has."""
    pipeline_parallel_size: _Count = 1
    """Ranks that the layers are split over."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """auto: what most weights have."""
    quantization: Scheme | None = None
    """Weights of fewer bits. Default: as they are; a folder of tools/quantize.py has fewer already."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together. Default: what the model was made for."""
    max_num_seqs: int = 64
    """Sequences that are computed at one time at most."""
    max_num_batched_tokens: int = 2048
    """Tokens of a step at most; longer prompts are computed in chunks."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Part of the GPU's memory (of a CPU's free memory) for weights and cache."""
    num_blocks: _Count | None = None
    """Blocks of the key/value cache. Default: what fits."""
    block_size: int = 32
    """Tokens of a block."""
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "float64", "fp8"] = "auto"
    """auto: the model's; fp8: half of 16 bits' memory, e4m3 with a scale for each token and head."""
    enable_prefix_caching: bool = True
    """Share keys and values of texts that begin alike."""
    enforce_eager: bool = True
    """Start at once. Else steps are compiled first (one rank of a CPU, in half precision) or captured (one GPU)."""
    batch_invariant: bool = False
    """A request's bits are the same in any company, on a CPU in 16 or 32 bits; prompts take 2 to 4 times as long."""
    num_speculative_tokens: Annotated[int, Field(ge=0, le=64)] = 0
    """Guess so many tokens from what followed the same words before; answers stay the same."""
    speculative_model: AnyPath | None = None
    """A small model of the same vocabulary that guesses them instead."""
    seed: int | None = None
    """Of the draws of requests that have none of their own. Default: a new one for each."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: requests that do not say how tokens are drawn take the model's generation_config.json."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each rank where there are as many, else the CPU."""
    rank_timeout: _Positive = 600.0
    """Seconds that ranks wait for one another, in a step or between requests; then all of them end."""

    def __post_init__(self) -> None:
        if self.speculative_model is not None and not self.num_speculative_tokens:
            raise ConfigError("speculative_model guesses num_speculative_tokens=0 tokens; give a number, for example 4")

    def engine_arguments(self) -> dict[str, Any]:
        """By which ``LLM(...)`` is made."""
        return {field.name: getattr(self, field.name) for field in fields(EngineOptions)}


@dataclass(frozen=True)
class ServerOptions(CheckedSettings):
    """Where a server listens, and what it takes on."""

    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 for all of this machine's."""
    port: int = 8000
    """0: a free one."""
    api_key: str | None = None
    """That clients must give. Default: none."""
    served_model_name: str | None = None
    """The name that clients ask for. Default: the folder's."""
    max_requests: _Count = 256
    """Prompts under way; more are told to come back later (429)."""
    max_body_mb: _Positive = 4.0
    """Size of a request's body."""
    request_timeout: _Positive = 600.0
    """Seconds that a request may take."""


@dataclass(frozen=True)
class ServeOptions(ServerOptions, EngineOptions):
    """What to serve, to whom, and how much at one time."""
