"""The key/value cache in blocks, and the attention core that reads and writes it.

Shapes: ``t`` tokens of a step, ``n`` heads and ``g`` key/value heads on this rank, ``d`` head dim, ``l`` tokens that a
query may see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.kernels.span_attention import span_attention
from megatron_ds.layers.attention_cores import AttentionRules


class PagedCache:
    """Keys and values of the layers of a stage.

    Args:
        layers: numbers of the layers. blocks: of how many tokens ``size``.
    """

    def __init__(
        self,
        layers: Iterable[int],
        blocks: int,
        size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.size = size
        shape = (blocks * size, kv_heads, head_dim)
        self.keys = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
        self.values = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Blocks to blocks, (from, to) each."""
        for source, target in copies:
            for of_layer in (*self.keys.values(), *self.values.values()):
                from_, to = source * self.size, target * self.size
                of_layer[to : to + self.size] = of_layer[from_ : from_ + self.size]


@dataclass(frozen=True)
class PagedSpan:
    """Where a span's tokens are: rows ``first`` to ``first + count`` of the step, places ``start`` ... of the text,
    whose tokens lie at ``slots [start + count]`` of the cache."""

    first: int
    count: int
    start: int
    slots: Tensor


class PagedBatch:
    """The spans of a step over a cache; makes the attention cores of its layers.

    Args:
        layer_of: from the number of an attention (its dropout site) to that of its layer.
    """

    def __init__(self, cache: PagedCache, spans: Sequence[PagedSpan], layer_of: Callable[[int], int]):
        self.cache, self.spans, self.layer_of = cache, spans, layer_of
        self.written = torch.cat([span.slots[span.start :] for span in spans])

    def make_core(
        self, rules: AttentionRules, length: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> PagedCore:
        if rules.layout is not None or not rules.causal:
            raise ConfigError("a key/value cache serves causal attention over all keys or a window, no sparse layout")
        return PagedCore(self, rules)


@dataclass(frozen=True)
class PagedCore:
    """Writes the keys and values of the step, and attends to those of each span's text."""

    batch: PagedBatch
    rules: AttentionRules

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: int = 0) -> Tensor:
        """``q [t, 1, n, d]``, ``k, v [t, 1, g, d]`` -> ``[t, 1, n * d]``."""
        layer = self.batch.layer_of(site)
        keys, values = self.batch.cache.keys[layer], self.batch.cache.values[layer]
        keys.index_copy_(0, self.batch.written, k[:, 0].to(keys.dtype))
        values.index_copy_(0, self.batch.written, v[:, 0].to(values.dtype))
        out = torch.empty_like(q[:, 0])
        for span in self.batch.spans:
            # Rows of one block of the text at a time: always the same ones together, whatever the chunk.
            for begin, end in _tiles(span.start, span.start + span.count, self.batch.cache.size):
                first = 0 if self.rules.window is None else max(0, begin - self.rules.window + 1)
                seen = span.slots[first:end]
                rows = slice(span.first + begin - span.start, span.first + end - span.start)
                out[rows] = span_attention(
                    q[rows, 0],
                    keys.index_select(0, seen).to(q.dtype),
                    values.index_select(0, seen).to(q.dtype),
                    window=self.rules.window,
                    alibi=self.rules.alibi,
                    softcap=self.rules.softcap,
                    first=first,
                )
        return out.flatten(1).unsqueeze(1)


def _tiles(start: int, stop: int, size: int) -> Iterable[tuple[int, int]]:
    while start < stop:
        end = min(stop, start // size * size + size)
        yield start, end
        start = end
