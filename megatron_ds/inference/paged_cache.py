"""The key/value cache in blocks, and the attention core that reads and writes it.

On a GPU a Triton kernel attends to all texts of a step at once. Elsewhere texts of about one length are gathered from
the cache, and torch's attention takes them together.

Shapes: ``t`` tokens of a step, ``n`` heads and ``g`` key/value heads on this rank, ``d`` head dim; ``b`` texts that are
attended to together, ``c`` queries and ``l`` keys of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.inference.pages import Pages
from megatron_ds.kernels.paged_attention import PAGED_ATTENTION, PagedTexts, paged_attention
from megatron_ds.kernels.span_attention import span_attention, span_bias
from megatron_ds.layers.attention_cores import AttentionRules

_SHORT = 64
"""Texts of fewer tokens are padded to the longest of them, longer ones to less than twice their length."""
_KEPT_BIASES = 1 << 23
"""Elements of the biases of a step that are kept for all layers; more of them are made again by each."""


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
        self.size, self.device = size, device
        numbers = list(layers)

        def made() -> dict[int, Pages]:
            return {layer: Pages(blocks * size, kv_heads, head_dim, dtype, device) for layer in numbers}

        self.keys, self.values = made(), made()

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Blocks to blocks, (from, to) each."""
        for source, target in copies:
            for of_layer in (*self.keys.values(), *self.values.values()):
                of_layer.copy(*(slice(block * self.size, (block + 1) * self.size) for block in (source, target)))


@dataclass(frozen=True)
class PagedSpan:
    """Rows ``first`` to ``first + count`` of the step: the tokens of a text from place ``start`` on, whose keys and
    values are in ``blocks``."""

    first: int
    count: int
    start: int
    blocks: Sequence[int]

    @property
    def stop(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class PagedStep:
    """The texts of a step as tensors on its device, and the ``written [t]`` int64 slots of its keys and values."""

    texts: PagedTexts
    written: Tensor

    @classmethod
    def of(cls, spans: Sequence[PagedSpan], size: int, device: torch.device | str) -> PagedStep:
        tables = np.zeros((len(spans), max(len(span.blocks) for span in spans)), np.int32)
        for table, span in zip(tables, spans):
            table[: len(span.blocks)] = span.blocks
        numbers = np.array([(span.first, span.count, span.start) for span in spans], np.int32)
        written = np.concatenate([_slots(span.blocks, size, span.start, span.stop) for span in spans])
        counts = numbers[:, 1]
        texts = PagedTexts(
            torch.from_numpy(tables).to(device),
            torch.from_numpy(numbers).to(device),
            size,
            longest=int(counts.max()),
            decodes=bool((counts == 1).any()),
        )
        return cls(texts, torch.from_numpy(written).to(device))


class PagedBatch:
    """A step over a cache; makes the attention cores of its layers.

    Args:
        layer_of: from the number of an attention (its dropout site) to that of its layer.
        apart: attend to the rows of one block of one text at a time: always the same ones together, whatever else is
            computed. The GPU's kernel does not depend on it anyway.
    """

    def __init__(self, cache: PagedCache, step: PagedStep, layer_of: Callable[[int], int], apart: bool = False):
        self.cache, self.step, self.layer_of, self.apart = cache, step, layer_of, apart

    def make_core(
        self, rules: AttentionRules, length: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> PagedCore:
        if rules.layout is not None or not rules.causal:
            raise ConfigError("a key/value cache serves causal attention over all keys or a window, no sparse layout")
        if PAGED_ATTENTION.choose(torch.empty(0, dtype=dtype, device=device)) == "triton":
            return PagedCore(self, rules, None)
        together = self._together()
        tiles = [self._tile(spans, rules, len(together) == 1) for spans in together]
        heads = 1 if rules.alibi is None else len(rules.alibi.slopes)
        keep = heads * sum(tile.texts * tile.count * tile.length for tile in tiles) <= _KEPT_BIASES
        biases = [tile.bias(rules, dtype, device) for tile in tiles] if keep else None
        return PagedCore(self, rules, tiles, biases)

    def _together(self) -> list[list[PagedSpan]]:
        """The texts, those in one list being attended to in one call."""
        texts = self.step.texts
        numbers = zip(texts.spans.tolist(), texts.tables.cpu().numpy())
        spans = [PagedSpan(first, count, start, table) for (first, count, start), table in numbers]
        return _apart(spans, texts.size) if self.apart else _together(spans)

    def _tile(self, spans: Sequence[PagedSpan], rules: AttentionRules, alone: bool) -> _Tile:
        firsts = [0 if rules.window is None else max(0, span.start - rules.window + 1) for span in spans]
        slots = [_slots(span.blocks, self.cache.size, first, span.stop) for span, first in zip(spans, firsts)]
        most, count, device = max(map(len, slots)), spans[0].count, self.cache.device
        padded = any(len(of_span) < most for of_span in slots)
        if padded:  # hidden from the query; its own, for nobody reads the keys of others
            slots = [np.pad(of_span, (0, most - len(of_span)), constant_values=of_span[0]) for of_span in slots]
        plain = rules.window is None and rules.alibi is None and rules.softcap is None
        return _Tile(
            None
            if alone
            else _index(np.concatenate([np.arange(span.first, span.first + count) for span in spans]), device),
            _index(slots[0] if len(slots) == 1 else np.concatenate(slots), device),
            [span.start for span in spans],
            firsts,
            count,
            most,
            causal=plain and count > 1 and spans[0].start == 0,
            sees_all=rules.alibi is None and count == 1 and not padded,
        )


@dataclass(frozen=True)
class _Tile:
    """Queries that are attended to in one call, as many of each text.

    Attributes:
        rows: of the step, those of one text after those of another; None: all, in their order.
        slots: of the cache, where their keys and values are, likewise.
        starts, firsts: places in its text of each text's first query and first key.
        count, length: queries and keys of each text.
        causal: no rule but causality holds, and the queries are those of all keys.
        sees_all: every query sees every key, without a bias.
    """

    rows: slice | Tensor | None
    slots: slice | Tensor
    starts: Sequence[int]
    firsts: Sequence[int]
    count: int
    length: int
    causal: bool
    sees_all: bool

    @property
    def texts(self) -> int:
        return len(self.starts)

    def bias(self, rules: AttentionRules, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        if self.causal or self.sees_all:
            return None
        queries, keys = (
            torch.tensor(first, device=device).unsqueeze(1) + torch.arange(count, device=device)
            for first, count in ((self.starts, self.count), (self.firsts, self.length))
        )
        return span_bias(queries, keys, dtype, rules.window, rules.alibi)

    def queries(self, q: Tensor) -> Tensor:
        """``[b, c, n, d]`` of the step's ``q [t, n, d]``."""
        if self.rows is not None:
            q = q[self.rows] if isinstance(self.rows, slice) else q.index_select(0, self.rows)
        return q.reshape(self.texts, self.count, *q.shape[1:])

    def read(self, of_layer: Pages, dtype: torch.dtype) -> Tensor:
        """``[b, l, g, d]`` of the cache's keys or values."""
        found = of_layer.read(self.slots, dtype)
        return found.view(self.texts, self.length, *found.shape[1:])


@dataclass(frozen=True)
class PagedCore:
    """Writes the keys and values of the step, and attends to those of each text.

    Attributes:
        tiles: that torch's attention takes one by one; None: the Triton kernel takes all texts.
        biases: of the tiles, for all layers; None: they are made by each.
    """

    batch: PagedBatch
    rules: AttentionRules
    tiles: list[_Tile] | None
    biases: list[Tensor | None] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: int = 0) -> Tensor:
        """``q [t, 1, n, d]``, ``k, v [t, 1, g, d]`` -> ``[t, 1, n * d]``."""
        layer = self.batch.layer_of(site)
        keys, values, step = self.batch.cache.keys[layer], self.batch.cache.values[layer], self.batch.step
        keys.write(step.written, k[:, 0])
        values.write(step.written, v[:, 0])
        q, r = q[:, 0], self.rules
        if self.tiles is None:
            found = paged_attention(q, keys.pages, values.pages, step.texts, r.window, r.alibi, r.softcap)
            return found.flatten(1).unsqueeze(1)
        parts = [self._of_tile(number, tile, q, keys, values) for number, tile in enumerate(self.tiles)]
        if len(parts) == 1:
            return parts[0].reshape(len(q), 1, -1)
        out = torch.empty_like(q)
        for tile, of_tile in zip(self.tiles, parts):
            assert tile.rows is not None
            out[tile.rows] = of_tile.flatten(0, 1)
        return out.flatten(1).unsqueeze(1)

    def _of_tile(self, number: int, tile: _Tile, q: Tensor, keys: Pages, values: Pages) -> Tensor:
        bias = tile.bias(self.rules, q.dtype, q.device) if self.biases is None else self.biases[number]
        return span_attention(
            tile.queries(q),
            tile.read(keys, q.dtype),
            tile.read(values, q.dtype),
            bias,
            tile.causal,
            self.rules.softcap,
        )


def _slots(blocks: Sequence[int] | np.ndarray, size: int, start: int, stop: int) -> np.ndarray:
    """Where the tokens ``start`` to ``stop`` of a text are in the cache."""
    first = start // size
    used = np.asarray(blocks[first : -(-stop // size)], np.int64)
    return (used[:, None] * size + np.arange(size)).ravel()[start - first * size : stop - first * size]


def _together(spans: Iterable[PagedSpan]) -> list[list[PagedSpan]]:
    """Spans that are attended to in one call: those of one token and of about as long texts, or one alone."""
    found: dict[tuple[int, int], list[PagedSpan]] = {}
    for number, span in enumerate(spans):
        key = (-1, (span.start // _SHORT).bit_length()) if span.count == 1 else (number, 0)
        found.setdefault(key, []).append(span)
    return list(found.values())


def _apart(spans: Iterable[PagedSpan], size: int) -> list[list[PagedSpan]]:
    """Spans, cut where blocks end."""
    found = []
    for span in spans:
        start = span.start
        while start < span.stop:
            end = min(span.stop, start // size * size + size)
            found.append([PagedSpan(span.first + start - span.start, end - start, start, span.blocks)])
            start = end
    return found


def _index(numbers: np.ndarray, device: torch.device | str) -> slice | Tensor:
    """A slice, which copies nothing, where they are consecutive."""
    if bool((np.diff(numbers) == 1).all()):
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.from_numpy(numbers).to(device)
