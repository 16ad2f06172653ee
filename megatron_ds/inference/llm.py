"""``LLM``: a model that generates text, with the arguments and methods that the field knows from vLLM."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from megatron_ds.comm.together import exchange
from megatron_ds.errors import ConfigError
from megatron_ds.host import free_host_memory
from megatron_ds.inference import served_model
from megatron_ds.inference.batching import Batcher, require_budget
from megatron_ds.inference.block_pool import BlockPool
from megatron_ds.inference.checked_settings import takes_fields_of
from megatron_ds.inference.decode_graphs import GraphSizes, capture_for
from megatron_ds.inference.draft_model import DraftModel
from megatron_ds.inference.model_runner import CacheSize, ModelRunner, bytes_of_token
from megatron_ds.inference.outputs import RequestOutput
from megatron_ds.inference.ranks import Ranks
from megatron_ds.inference.sampling_params import SamplingParams, suggested_settings
from megatron_ds.inference.serving_engine import ServingEngine
from megatron_ds.inference.serving_options import EngineOptions
from megatron_ds.inference.serving_recipes import use_serving_recipes
from megatron_ds.inference.texts import Prompt, Texts, unnamed
from megatron_ds.kernels.float8 import E4M3
from megatron_ds.mesh import Axis

log = logging.getLogger(__name__)


class LLM:
    """A decoder that serves requests. Its arguments are the fields of
    :class:`~megatron_ds.inference.serving_options.EngineOptions`.

    Raises:
        CheckpointError, ConfigError, DataError: the model cannot be read or served like this.
    """

    @takes_fields_of(EngineOptions)
    def __init__(self, options: EngineOptions):
        o = self.options = options
        require_budget(o.max_num_seqs, o.max_num_batched_tokens, o.block_size)
        source = served_model.find(o.model)
        draft_source = DraftModel.find(o.speculative_model, source.config) if o.speculative_model is not None else None
        _require_recipes(source.quantization, o)
        served_model.require_split(source.config, o.tensor_parallel_size, o.pipeline_parallel_size)
        self.max_model_len = served_model.text_length(source, o.max_model_len)
        self.suggested = suggested_settings(source.generation) if o.generation_config == "auto" else {}
        self.texts = Texts.load(o.model, o.tokenizer or source.tokenizer)
        self._ranks = Ranks(o)
        for note in source.notes if self._ranks.mesh.rank == 0 else ():
            log.warning("%s: %s", o.model, note)
        try:
            with self._ranks.exchange():
                self.engine = self._engine(source, draft_source)
        except BaseException:
            self._ranks.abort()
            raise
        self._ranks.start_heartbeat(self.engine.beat)
        self._numbers, self._open = itertools.count(), True

    def _engine(self, source: served_model.Source, draft_source: served_model.Source | None) -> ServingEngine:
        """With the model's weights, and with memory for its cache."""
        o, mesh = self.options, self._ranks.mesh
        dtype = _dtype(o.dtype, source.dtype)
        cache_dtype = _dtype(o.kv_cache_dtype, dtype)
        stage = served_model.build(source, mesh, dtype)
        head = use_serving_recipes(stage, None if source.quantization else o.quantization, o.batch_invariant)
        draft = None
        if draft_source is not None and mesh.rank == 0:  # whole, on the first rank
            draft = DraftModel(draft_source, dtype, mesh.device, o.max_num_batched_tokens, o.num_speculative_tokens)
        block = o.block_size * (bytes_of_token(stage, cache_dtype) + (draft.bytes_of_token() if draft else 0))
        of_text = -(-self.max_model_len // o.block_size)
        capture = None if o.enforce_eager else capture_for(mesh)
        graphs = GraphSizes(o.max_num_seqs, of_text, o.block_size, source.config.padded_vocab, dtype)
        memory = _memory(mesh.device, o.gpu_memory_utilization) // self._ranks.sharing
        memory -= graphs.bytes if capture else 0
        # One block is no text's. All ranks take the smallest number before anything is made: an error is one on each.
        blocks = _smallest(o.num_blocks or min(o.max_num_seqs * of_text, memory // block - 1), mesh.world)
        if blocks < min(of_text, 2):
            raise ConfigError(
                f"there is memory for {max(blocks, 0)} blocks of {block} bytes of the key/value cache, which is no "
                f"text of {self.max_model_len} tokens; raise gpu_memory_utilization={o.gpu_memory_utilization}, lower "
                "max_model_len, or split the model over more ranks (tensor_parallel_size)"
            )
        size = CacheSize(blocks, o.block_size, cache_dtype)
        runner = ModelRunner(stage, mesh, size, head, o.batch_invariant, compiled=not o.enforce_eager)
        runner.capture(capture, graphs)
        if draft is not None:
            draft.open(blocks, o.block_size)
        pool, ends = BlockPool(blocks, o.block_size, o.enable_prefix_caching), self.texts.ends(source.generation)
        batcher = Batcher(pool, o.max_num_seqs, o.max_num_batched_tokens, o.num_speculative_tokens)
        return ServingEngine(runner, batcher, mesh, self.max_model_len, self.texts.tokenizer, ends, draft)

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

    def add(self, prompt: Prompt, params: SamplingParams, whole: bool = False, name: str | None = None) -> str:
        """Queue a request, which :meth:`step` serves; returns its id, ``name`` where it is given.

        Args:
            whole: :meth:`step` tells of it at its end alone.
        """
        name = name or f"request-{next(self._numbers)}"
        if params.seed is None and self.options.seed is not None:
            params = replace(params, seed=self.options.seed)
        given = unnamed(prompt)
        self.engine.add(name, self.texts.tokenize(given), params, given if isinstance(given, str) else None, whole)
        return name

    def step(self) -> list[RequestOutput]:
        """Compute one batch of what is queued; returns the requests that have got further.

        Raises:
            ConfigError: another rank has ended, does not answer, or waits in the middle of a step that was interrupted.
        """
        with self._ranks.exchange():
            return self.engine.step()

    def require_ranks(self) -> None:
        """Raises :class:`ConfigError` where another rank is known to have ended, or not to answer."""
        self._ranks.require_alive()

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
        """On the other ranks: take part until the first one closes.

        Raises:
            ConfigError: it has ended otherwise, or does not answer, or this rank has no part in the model.
        """
        if self._ranks.mesh.rank == 0:
            raise ConfigError(
                "tensor_parallel_size x pipeline_parallel_size = 1, but more ranks were started; start one, or split "
                "the model over all of them"
            )
        with self._ranks.exchange():
            self.engine.follow()

    def close(self) -> None:
        """End the ranks that this process has started.

        Raises:
            ConfigError: one of them has ended before.
        """
        if self._open:
            self._open = False
            self._ranks.close(self.engine.stop if self._ranks.mesh.rank == 0 else None)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], Integral))


def _dtype(name: str, auto: torch.dtype) -> torch.dtype:
    return auto if name == "auto" else E4M3 if name == "fp8" else getattr(torch, name)


def _require_recipes(of_folder: str | None, o: EngineOptions) -> None:
    if of_folder and o.quantization not in (None, of_folder):
        raise ConfigError(
            f"quantization={o.quantization!r}, but the weights are {of_folder!r} already; leave it out, or serve the "
            "unquantised model"
        )
    if o.batch_invariant and (o.quantization or of_folder):
        raise ConfigError("batch_invariant=True goes with quantization=None: quantised products have no such kernels")


def _memory(device: torch.device, part: float) -> int:
    """Bytes for the cache, the weights being there."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return int(whole * part) - (whole - free)
    return int(free_host_memory() * part)


def _smallest(blocks: int, world: Axis) -> int:
    """The number of blocks that every rank has memory for."""
    return min(int(text) for text in exchange(world, str(blocks)))
