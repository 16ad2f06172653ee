"""Text generation: a paged key/value cache, continuous batching, tensor and pipeline parallelism."""

from megatron_ds.inference.llm import LLM
from megatron_ds.inference.outputs import CompletionOutput, RequestOutput
from megatron_ds.inference.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
