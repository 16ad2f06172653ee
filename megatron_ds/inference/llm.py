"""``LLM``: a model that generates text, with the arguments and methods that the field knows from vLLM."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from tqdm import tqdm

from megatron_ds.comm.together import exchange
from megatron_ds.errors import ConfigError
from megatron_ds.host import free_host_memory
from megatron_ds.inference import served_model
from megatron_ds.inference.batching import Batcher, require_budget
from megatron_ds.inference.block_pool import BlockPool
from megatron_ds.inference.decode_graphs import GraphSizes, capture_for
from megatron_ds.inference.draft_model import DraftModel
from megatron_ds.inference.invariant_recipe import BatchInvariant
from megatron_ds.inference.model_runner import CacheSize, ModelRunner, bytes_of_token
from megatron_ds.inference.outputs import RequestOutput
from megatron_ds.inference.packed_recipe import pack_model
from megatron_ds.inference.quantized_recipes import linear_layers, quantize_model, require_scheme
from megatron_ds.inference.ranks import Ranks
from megatron_ds.inference.sampling_params import SamplingParams, suggested_settings
from megatron_ds.inference.serving_engine import ServingEngine
from megatron_ds.inference.texts import Prompt, Texts
from megatron_ds.layers.recipe import OwnPrecision, Recipe
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.models.transformer import Transformer

CACHE_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({**served_model.DTYPES, "fp8": torch.float8_e4m3fn})


class LLM:
    """A decoder that serves requests.

    Args:
        model: a run's checkpoint directory or one step's, or a folder of ``transformers``.
        tokenizer: where its tokenizer is, if not with the model.
        tensor_parallel_size, pipeline_parallel_size: ranks that the layers' weights, and the layers, are split over.
            The other ranks are started by this process, unless ``torchrun`` has started it.
        dtype: ``auto`` (what most weights have), ``bfloat16``, ``float16``, ``float32`` or ``float64``.
        quantization: weights of fewer bits, ``int8``, ``w8a8``, ``fp8`` or ``int4``; see
            :mod:`megatron_ds.inference.quantized_recipes`. A folder of ``tools/quantize.py`` needs none: its weights
            have them already.
        max_model_len: tokens of prompt and answer together at most. Default: what the model was made for.
        max_num_seqs: sequences that are computed at one time at most.
        max_num_batched_tokens: tokens of a step at most; longer prompts are computed in chunks.
        gpu_memory_utilization: the part of a GPU's memory (on a CPU: of what is free) for weights and cache.
        num_blocks: blocks of the key/value cache, instead of what the memory allows.
        block_size: tokens of a block.
        kv_cache_dtype: ``auto`` (the model's), one of the names of ``dtype``, or ``fp8``: e4m3 with a scale for each
            token and head.
        batch_invariant: a request's logits do not depend, bit for bit, on what is computed with it: on a CPU, in
            bfloat16, float16 or float32, as long as it is not preempted. Products of many rows take two to four times
            as long.
        num_speculative_tokens: tokens that are guessed at most, from what followed the same words before, and checked
            in the same step. The answers stay what they are, draws included; text that repeats itself comes faster.
        speculative_model: a small model of the same vocabulary that guesses instead, as many tokens.
        enable_prefix_caching: texts with the same beginning share its keys and values.
        enforce_eager: compile nothing at the start and capture nothing. False: on one rank of a CPU steps in half
            precision become compiled graphs, which takes half a minute or more and a C++ compiler; on one GPU decode
            steps become CUDA graphs, for 1, 2, 4, 8, ... texts up to max_num_seqs.
        seed: of the draws of requests that have none of their own; None: a new one for each.
        generation_config: ``auto``: a request without settings of its own (on a server: without one of them) takes the
            temperature, top-k, top-p, min-p and penalties of the model's generation_config.json; or ``none``.

    Raises:
        CheckpointError, ConfigError, DataError: the model cannot be read or served like this.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        gpu_memory_utilization: float = 0.9,
        num_blocks: int | None = None,
        block_size: int = 32,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        enforce_eager: bool = True,
        batch_invariant: bool = False,
        num_speculative_tokens: int = 0,
        speculative_model: str | Path | None = None,
        seed: int | None = None,
        device: str = "auto",
        generation_config: str = "auto",
        place: tuple[int, int] | None = None,
    ):
        settings = _plain({name: value for name, value in locals().items() if name not in ("self", "place")})
        _require_parts(gpu_memory_utilization, num_speculative_tokens)
        require_budget(max_num_seqs, max_num_batched_tokens, block_size)
        source = served_model.find(model)
        _require_recipes(quantization, source, batch_invariant)
        small = _small(speculative_model, num_speculative_tokens, source)
        own = source.dtype if dtype == "auto" else _dtype("dtype", dtype)
        cache_dtype = own if kv_cache_dtype == "auto" else _dtype("kv_cache_dtype", kv_cache_dtype, CACHE_DTYPES)
        served_model.require_split(source.config, tensor_parallel_size, pipeline_parallel_size)
        self.model, self.seed, self.max_model_len = Path(model), seed, served_model.text_length(source, max_model_len)
        self.config, self.suggested = source.config, _suggested(source, generation_config)
        self.texts = Texts.load(model, tokenizer or source.tokenizer)
        self._ranks = Ranks(MeshShape(pp=pipeline_parallel_size, tp=tensor_parallel_size), device, settings, place)
        mesh = self._ranks.mesh
        stage = served_model.build(source, mesh, own)
        head = _recipes(stage, None if source.quantization else quantization, batch_invariant)
        draft = _draft_model(small, own, mesh, max_num_batched_tokens, num_speculative_tokens)
        block = block_size * (bytes_of_token(stage, cache_dtype) + (draft.bytes_of_token() if draft else 0))
        of_text = -(-self.max_model_len // block_size)
        capture = None if enforce_eager else capture_for(mesh)
        graphs = GraphSizes(max_num_seqs, of_text, block_size, source.config.padded_vocab, own)
        memory = _memory(mesh.device, gpu_memory_utilization) - (graphs.bytes if capture else 0)
        # One block is no text's. All ranks take the smallest number before anything is made: an error is one on each.
        blocks = _smallest(num_blocks or min(max_num_seqs * of_text, memory // block - 1), mesh.world)
        _require_blocks(blocks, of_text, block, self.max_model_len, gpu_memory_utilization)
        size = CacheSize(blocks, block_size, cache_dtype)
        runner = ModelRunner(stage, mesh, size, head, batch_invariant, compiled=not enforce_eager)
        runner.capture(capture, graphs)
        if draft is not None:
            draft.open(blocks, block_size)
        pool, ends = BlockPool(blocks, block_size, enable_prefix_caching), self.texts.ends(source.generation)
        batcher = Batcher(pool, max_num_seqs, max_num_batched_tokens, num_speculative_tokens)
        self.engine = ServingEngine(runner, batcher, mesh, self.max_model_len, self.texts.tokenizer, ends, draft)
        self._numbers, self._open = itertools.count(), True

    # Answers

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The answers to all prompts, in their order. On ranks of ``torchrun`` but the first: an empty list."""
        if self._ranks.mesh.rank > 0:
            self.follow()
            return []
        several: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        params = sampling_params or SamplingParams(**self.suggested)
        each = [params] * len(several) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(several):
            raise ConfigError(f"{len(several)} prompts and {len(each)} sampling_params; give one for all, or one each")
        names: list[str] = []
        try:
            for prompt, of_prompt in zip(several, each):
                names.append(self.add(prompt, of_prompt, whole=True))
            done = self._finished(names, use_tqdm)
        except BaseException:
            for name in names:
                self.engine.abort(name)
            raise
        return [done[name] for name in names]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The answers to one conversation or several, by the model's chat template.

        Args:
            tools: shown to the model. chat_template_kwargs: further variables of the template.
            add_generation_prompt, continue_final_message: see :meth:`ChatTemplate.prompt`.
        """
        several: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        render = partial(
            self.texts.render_chat,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=chat_template_kwargs,
        )
        return self.generate([render(one) for one in several], sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """What there is of the answer, after every step."""
        name = self.add(prompt, sampling_params or SamplingParams(**self.suggested))
        finished = False
        try:
            while not finished:
                for output in self.step():
                    if output.request_id == name:
                        finished = output.finished
                        yield output
        finally:
            if not finished:
                self.engine.abort(name)

    def add(self, prompt: Prompt, params: SamplingParams, whole: bool = False) -> str:
        """Queue a request; returns its id. :meth:`step` serves it. ``whole``: it tells of it at its end alone."""
        name = f"request-{next(self._numbers)}"
        text = prompt if isinstance(prompt, str) else None
        self.engine.add(name, self.texts.tokenize(prompt), self.seeded(params), text, whole)
        return name

    def seeded(self, params: SamplingParams) -> SamplingParams:
        """With this model's seed where the request has none of its own."""
        return replace(params, seed=self.seed) if params.seed is None and self.seed is not None else params

    def step(self) -> list[RequestOutput]:
        """Compute one batch of what is queued; returns the requests that have got further."""
        self._ranks.require_alive()
        return self.engine.step()

    def _finished(self, names: Sequence[str], show: bool) -> dict[str, RequestOutput]:
        done: dict[str, RequestOutput] = {}
        wanted = set(names)
        with tqdm(total=len(names), desc="prompts", disable=not show, unit="prompt") as bar:
            while len(done) < len(wanted):
                for output in self.step():
                    if output.finished and output.request_id in wanted:
                        done[output.request_id] = output
                        bar.update()
                bar.set_postfix_str(f"{self.engine.counters.answer_tokens} tokens", refresh=False)
        return done

    # The end

    def follow(self) -> None:
        """On the other ranks: take part until the first one closes."""
        self.engine.follow()

    def close(self) -> None:
        """End the ranks that this process has started."""
        if self._open and self._ranks.mesh.rank == 0:
            self.engine.stop()
        if self._open:
            self._open = False
            self._ranks.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they go to other processes."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))


def _dtype(setting: str, name: str, known: Mapping[str, torch.dtype] = served_model.DTYPES) -> torch.dtype:
    if name not in known:
        raise ConfigError(f"{setting}={name!r}; use 'auto' or one of {', '.join(map(repr, known))}")
    return known[name]


def _suggested(source: served_model.Source, generation_config: str) -> dict[str, Any]:
    """Settings of requests that say nothing of them."""
    if generation_config not in ("auto", "none"):
        raise ConfigError(f"generation_config={generation_config!r}; use 'auto' or 'none'")
    return suggested_settings(source.generation) if generation_config == "auto" else {}


def _require_parts(gpu_memory_utilization: float, num_speculative_tokens: int) -> None:
    if not 0.0 < gpu_memory_utilization <= 1.0:
        raise ConfigError(f"gpu_memory_utilization={gpu_memory_utilization}; use a part from 0 to 1")
    if not 0 <= num_speculative_tokens <= 64:
        raise ConfigError(f"num_speculative_tokens={num_speculative_tokens}; use 0 to 64")


def _draft_model(
    source: served_model.Source | None, dtype: torch.dtype, mesh: Mesh, budget: int, most: int
) -> DraftModel | None:
    """Whole, on the first rank."""
    return None if source is None or mesh.rank > 0 else DraftModel(source, dtype, mesh.device, budget, most)


def _small(path: str | Path | None, most: int, source: served_model.Source) -> served_model.Source | None:
    """The model that guesses."""
    if path is None:
        return None
    if not most:
        raise ConfigError("speculative_model guesses num_speculative_tokens=0 tokens; give a number, for example 4")
    return DraftModel.find(path, source.config.vocab_size)


def _require_recipes(quantization: str | None, source: served_model.Source, batch_invariant: bool) -> None:
    if quantization is not None:
        require_scheme(quantization)
    if source.quantization is not None and quantization not in (None, source.quantization):
        raise ConfigError(
            f"quantization={quantization!r}, but the weights are {source.quantization!r} already; leave it out, or "
            "serve the unquantised model"
        )
    if batch_invariant and (quantization or source.quantization):
        raise ConfigError("batch_invariant=True goes with quantization=None: quantised products have no such kernels")


def _recipes(stage: Transformer, quantization: str | None, batch_invariant: bool) -> Recipe | None:
    """How the layers of a stage multiply; returns how its head does."""
    head = pack_model(stage) if quantization is None else quantize_model(stage, quantization)
    if not batch_invariant:
        return head
    for layer in linear_layers(stage):
        layer.recipe = BatchInvariant(layer.recipe)  # type: ignore[arg-type]
    return BatchInvariant(head or OwnPrecision())


def _require_blocks(blocks: int, of_text: int, block: int, longest: int, part: float) -> None:
    if blocks < min(of_text, 2):
        raise ConfigError(
            f"there is memory for {max(blocks, 0)} blocks of {block} bytes of the key/value cache, which is no text of "
            f"{longest} tokens; raise gpu_memory_utilization={part}, lower max_model_len, or split the model over more "
            "ranks (tensor_parallel_size)"
        )


def _memory(device: torch.device, part: float) -> int:
    """Bytes for the cache, the weights being there."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return int(whole * part) - (whole - free)
    return int(free_host_memory() * part)


def _smallest(blocks: int, world: Axis) -> int:
    """The number of blocks that every rank has memory for."""
    return min(int(text) for text in exchange(world, str(blocks)))
