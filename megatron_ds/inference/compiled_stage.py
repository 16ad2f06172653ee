"""Compiled forward passes for generation: a model as Inductor graphs, on a CPU.

The model's own code is traced. Where prompts are computed, attention stays one operator a layer, called with the core
of the step, and everything else between the matrix products is fused. A step of decoding is one graph, attention and
the vocabulary's projection included.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from megatron_ds.inference.batching import Span
from megatron_ds.inference.paged_cache import PagedCache
from megatron_ds.kernels.cpu.compiled_graph import compile_graph, record
from megatron_ds.kernels.cpu.decode_attention import DecodedBlocks, decode_attention
from megatron_ds.kernels.registry import define
from megatron_ds.layers.attention_cores import AttentionCore, AttentionRules, MakeCore
from megatron_ds.layers.recipe import Recipe
from megatron_ds.models.block import SITES_A_BLOCK
from megatron_ds.models.transformer import MicroBatch, Transformer

_TOKENS, _LONGEST, _CACHE, _BLOCKS = 61, 59, 67, 71
"""Sizes for which graphs for any numbers are recorded: tokens, blocks of the longest text, of the cache, of all texts.
They are primes, which are no sizes of a model."""
_CORES: ContextVar[list[AttentionCore]] = ContextVar("attention cores of the step")

define(
    "attend(Tensor q, Tensor k, Tensor v, int site, int kind) -> Tensor",
    lambda q, k, v, site, kind: _CORES.get()[kind].attend(q, k, v, site),
    lambda q, k, v, site, kind: q.new_empty((*q.shape[:2], q.shape[2] * q.shape[3])),
)


class _Recorded:
    """Stands for the core of the ``kind``-th rules while a graph is recorded."""

    def __init__(self, kind: int):
        self.kind = kind

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: int = 0) -> Tensor:
        out: Tensor = torch.ops.megatron_ds.attend(q, k, v, site, self.kind)
        return out


class CompiledStage:
    """What the vocabulary's projection is applied to, of a whole model in evaluation mode, for any number of tokens.

    Args:
        compiled: False leaves the graph to be run operator by operator.
    """

    def __init__(self, model: Transformer, compiled: bool = True):
        self._model = model
        self._kinds: list[AttentionRules] = []

        def make_core(rules: AttentionRules, *_: object) -> AttentionCore:
            self._kinds.append(rules)
            return _Recorded(len(self._kinds) - 1)

        def run(tokens: Tensor, positions: Tensor) -> Tensor:
            micro_batch = {"tokens": tokens, "position_ids": positions}
            return model.head_input(model.hidden_states(micro_batch, None, make_core))

        places = torch.zeros(1, _TOKENS, dtype=torch.int64)
        graph = record(run, (places, places.clone()), {_TOKENS})
        self._run = compile_graph(graph) if compiled else lambda *inputs: graph(*inputs)[0]

    def head_input(self, micro_batch: MicroBatch, hidden: Tensor | None, make_core: MakeCore) -> Tensor:
        """``Transformer.head_input`` of its ``hidden_states``, for ``[1, t]`` tokens."""
        tokens, positions = micro_batch["tokens"], micro_batch["position_ids"]
        c, dtype = self._model.config, self._model.output_weight.dtype
        cores = [make_core(rules, tokens.shape[1], c.head_size, tokens.device, dtype) for rules in self._kinds]
        before = _CORES.set(cores)
        try:
            return self._run(tokens, positions)
        finally:
            _CORES.reset(before)


class _DecodingCore:
    """Writes the keys and values of a step to the layers' ``pages``, and attends to those of ``at``."""

    def __init__(self, pages: Sequence[Tensor], at: DecodedBlocks, written: tuple[Tensor, Tensor], of: AttentionRules):
        self.pages, self.at, self.written, self.rules = pages, at, written, of

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: int = 0) -> Tensor:
        """``q [b, 1, n, d]``, ``k, v [b, 1, g, d]`` -> ``[b, 1, n * d]``."""
        layer = (site - 1) // SITES_A_BLOCK
        keys, values = self.pages[2 * layer : 2 * layer + 2]
        block, slot = self.written
        keys[block, :, slot] = k[:, 0].to(keys.dtype)
        values[block, :, slot] = v[:, 0].to(values.dtype)
        out = decode_attention(q[:, 0], keys, values, self.at, self.rules.window, self.rules.softcap)
        return out.flatten(1).unsqueeze(1)


class CompiledDecoding:
    """Steps that compute one token of each text, of a whole model in evaluation mode, as one graph for any texts.

    Args:
        head: the recipe of the vocabulary's projection.
        compiled: False leaves the graph to be run operator by operator.
    """

    def __init__(self, model: Transformer, head: Recipe, cache: PagedCache, compiled: bool = True):
        self._size = size = cache.size
        pages = chain.from_iterable(zip(cache.keys.values(), cache.values.values()))
        self._pages = [one.data for one in pages]
        self._columns = torch.arange(_LONGEST)
        windows: list[int] = []

        def run(of_texts: Tensor, of_blocks: Tensor, columns: Tensor, *pages: Tensor) -> Tensor:
            tokens, places, firsts = of_texts
            last = places // size
            blocks, texts, starts = of_blocks
            at = DecodedBlocks(places, blocks, texts, starts, firsts[:, None] + torch.minimum(columns, last[:, None]))
            written = blocks[firsts + last], places % size

            def make_core(rules: AttentionRules, *_: object) -> AttentionCore:
                windows.extend(filter(None, [rules.window]))
                return _DecodingCore(pages, at, written, rules)

            hidden = model.hidden_states({"tokens": tokens[None], "position_ids": places[None]}, None, make_core)
            return model.local_logits(model.head_input(hidden), head.product)[:, 0]

        numbers = (torch.zeros(3, count, dtype=torch.int64) for count in (_TOKENS, _BLOCKS))
        like = (torch.zeros_like(one[:1]).expand(_CACHE, -1, -1, -1).contiguous() for one in self._pages)
        graph = record(run, (*numbers, self._columns, *like), {_TOKENS, _LONGEST, _CACHE, _BLOCKS})
        self._run = compile_graph(graph, in_one_call=True) if compiled else lambda *inputs: graph(*inputs)[0]
        self._longest = 2 * min(windows, default=1 << 62)
        self._step: _DecodingStep | None = None

    @staticmethod
    def can(model: Transformer, cache: PagedCache) -> bool:
        """Whether these can be: no biases of positions, no scales of keys."""
        return model.config.position != "alibi" and all(pages.scale is None for pages in cache.keys.values())

    def takes(self, spans: Sequence[Span]) -> bool:
        """Whether it is such a step, and most keys that it would read are seen."""
        return all(span.count == 1 and span.start < self._longest for span in spans)

    def run(self, spans: Sequence[Span], copied: bool = False) -> Tensor:
        """Logits ``[b, v]``. ``copied``: a text has got other blocks since the last step."""
        if copied or self._step is None or not self._step.goes_on(spans):
            self._step = _DecodingStep(spans, self._size)
        most = self._step.most
        if most > len(self._columns):
            self._columns = torch.arange(2 * most)
        return self._run(self._step.of_texts, self._step.of_blocks, self._columns[:most], *self._pages)


class _DecodingStep:
    """The inputs of a step, of which the next one changes two rows where the same texts stay in the same blocks.

    Attributes:
        most: blocks of a text.
    """

    def __init__(self, spans: Sequence[Span], size: int):
        places = [span.start for span in spans]
        counts = [place // size + 1 for place in places]
        of_texts = np.array(([span.sequence.tokens[span.start] for span in spans], places, counts))
        ends = of_texts[2].cumsum()
        of_texts[2] = firsts = ends - counts  # of each text among the blocks of all
        of_blocks = np.empty((3, ends[-1]), np.int64)
        of_blocks[0] = list(chain.from_iterable(span.sequence.blocks[:count] for span, count in zip(spans, counts)))
        of_blocks[1] = texts = np.arange(len(spans)).repeat(counts)
        of_blocks[2] = (np.arange(ends[-1]) - firsts[texts]) * size
        self.of_texts, self.of_blocks, self.most = torch.from_numpy(of_texts), torch.from_numpy(of_blocks), max(counts)
        self._numbers, self._sequences = of_texts, [span.sequence for span in spans]
        self._next = [place + 1 for place in places]
        self._steps = size - 1 - max(place % size for place in places)  # until a text needs another block

    def goes_on(self, spans: Sequence[Span]) -> bool:
        """Whether ``spans`` are of the same texts, each one token further in its last block; then it is their step."""
        if not self._steps or [s.start for s in spans] != self._next or [s.sequence for s in spans] != self._sequences:
            return False
        self._steps -= 1
        self._numbers[0] = [span.sequence.tokens[span.start] for span in spans]
        self._numbers[1] = self._next
        self._next = [place + 1 for place in self._next]
        return True
