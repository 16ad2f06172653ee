"""The key/value cache in blocks, and the attention core that reads and writes it.

On a GPU a Triton kernel attends to all texts of a step at once. Elsewhere texts of about one length are gathered from
the cache, and torch's attention takes them together.

Shapes: ``t`` tokens of a step, ``n`` heads and ``g`` key/value heads on this rank, ``d`` head dim; ``b`` texts that are
attended to together, ``c`` queries and ``l`` keys of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.inference.pages import Pages
from megatron_ds.kernels.cpu.attention_route import QUERIES
from megatron_ds.kernels.paged_attention import PAGED_ATTENTION, PagedTexts, paged_attention
from megatron_ds.kernels.span_attention import span_attention, span_bias
from megatron_ds.layers.attention_cores import AttentionRules

_PADDED = 1 << 18
"""Elements of keys by which texts are padded at most, so that they are attended to in one call."""
ROUNDED = 16
"""Numbers of queries are padded to multiples of it, and those of keys to whole blocks: oneDNN compiles a kernel for
each shape, which takes longer than a product."""
_SCORES = 1 << 16
"""Scores of a head in a call of several prompts, at most: those of all heads stay in the processor's cache."""
_CUT = 1024
"""Keys of a prompt that is cut into parts, at most."""
_KEPT_BIASES = 1 << 23
"""Elements of the biases of a step that are kept for all layers; more of them are made again by each."""


class PagedCache:
    """Keys and values of the layers of a stage.

    Args:
        layers: numbers of the layers. blocks: of how many tokens ``size``.

    Attributes:
        keys, values: of each layer, which are parts of the ``pages``.
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
        self.size, self.device, self.row_elements = size, device, kv_heads * head_dim
        self._reads_whole_blocks = torch.device(device).type != "cuda" or dtype is torch.float64
        numbers = list(layers)
        self._firsts = torch.arange(2 * len(numbers), device=device) * blocks  # of the keys, or values, of each layer
        self.pages = Pages(2 * len(numbers) * blocks, size, kv_heads, head_dim, dtype, device)
        parts = [self.pages.part(slice(first, first + blocks)) for first in self._firsts.tolist()]
        self._bytes = self.pages.bytes_of(2 * len(numbers)) if torch.device(device).type == "cpu" else None
        self.keys, self.values = dict(zip(numbers, parts[::2])), dict(zip(numbers, parts[1::2]))

    def clear(self, blocks: Sequence[int]) -> None:
        """Fill these blocks with zeros: attention reads them whole, with weights of 0 behind a text's end.

        The GPU's kernel does not, and nothing is filled there.
        """
        if self._bytes is not None:
            for block in blocks:  # as there are few, calls are what takes the time
                for of_tensor in self._bytes:
                    of_tensor[:, block] = 0
        elif blocks and self._reads_whole_blocks:
            self.pages.clear((self._firsts + torch.tensor(blocks, device=self.device).unsqueeze(1)).flatten())

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Blocks to blocks, (from, to) each."""
        for source, target in copies:
            self.pages.copy(self._firsts + source, self._firsts + target)


@dataclass(frozen=True)
class StepPlaces:
    """Slots of the key/value cache for a step's ``t`` tokens, as arrays on the host; one text's after another's.

    Attributes:
        tables, spans: as :class:`PagedTexts` has them.
        positions: ``[t]`` in their texts. written: ``[t]`` slots of their keys and values.
        size: tokens of a block.
    """

    tables: np.ndarray
    spans: np.ndarray
    positions: np.ndarray
    written: np.ndarray
    size: int

    @classmethod
    def of(cls, blocks: Sequence[Sequence[int]], counts: Sequence[int], starts: Sequence[int], size: int) -> StepPlaces:
        """Of texts that have these ``blocks``: so many rows of each, the first one's place in its text."""
        tables = np.zeros((len(blocks), max(map(len, blocks))), np.int32)
        for table, of_text in zip(tables, blocks):
            table[: len(of_text)] = of_text
        spans = np.empty((len(blocks), 3), np.int32)
        spans[:, 1], spans[:, 2] = counts, starts
        ends = spans[:, 1].cumsum()
        spans[:, 0] = ends - spans[:, 1]
        texts, positions = np.arange(len(blocks)), np.array(starts, np.int64)
        if ends[-1] > len(blocks):
            texts = np.repeat(texts, counts)
            positions = np.arange(ends[-1]) - (spans[:, 0] - spans[:, 2])[texts]
        written = tables[texts, positions // size].astype(np.int64) * size + positions % size
        return cls(tables, spans, positions, written, size)

    @property
    def decodes(self) -> bool:
        """Whether it is one row of each text."""
        return len(self.positions) == len(self.spans)

    def padded(self, rows: int, block: int) -> StepPlaces:
        """With ``rows`` more of no text, whose keys and values go to a ``block`` that is nobody's."""
        ends = np.zeros(rows, np.int64), np.full(rows, block * self.size, np.int64)
        positions, written = (np.concatenate(both) for both in zip((self.positions, self.written), ends))
        return replace(self, positions=positions, written=written)

    def step(self, device: torch.device | str) -> PagedStep:
        counts = self.spans[:, 1]
        tables, spans, written = (torch.from_numpy(x).to(device) for x in (self.tables, self.spans, self.written))
        texts = PagedTexts(tables, spans, self.size, longest=int(counts.max()), decodes=bool((counts == 1).any()))
        return PagedStep(texts, written)


@dataclass(frozen=True)
class PagedStep:
    """The texts of a step as tensors on its device, and the ``written [t]`` int64 slots of its keys and values."""

    texts: PagedTexts
    written: Tensor


class PagedBatch:
    """A step over a cache; makes the attention cores of its layers.

    Args:
        layer_of: from the number of an attention (its dropout site) to that of its layer.
        apart: attend to the rows of one block of one text at a time: always the same ones together, whatever else is
            computed. The GPU's kernel does not depend on it anyway.
    """

    def __init__(self, cache: PagedCache, step: PagedStep, layer_of: Callable[[int], int], apart: bool = False):
        self.cache, self.step, self.layer_of, self.apart = cache, step, layer_of, apart
        self.written = cache.pages.rows_of(step.written)

    def make_core(
        self, rules: AttentionRules, length: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> PagedCore:
        if rules.layout is not None or not rules.causal:
            raise ConfigError("a key/value cache serves causal attention over all keys or a window, no sparse layout")
        if PAGED_ATTENTION.choose(torch.empty(0, dtype=dtype, device=device)) == "triton":
            return PagedCore(self, rules, None)
        pieces = self._pieces()
        whole = int(pieces[:, 2].sum()) == len(self.step.written)
        tiles = [self._tile(pieces[own], rules, whole and len(own) == len(pieces)) for own in self._together(pieces)]
        heads = 1 if rules.alibi is None else len(rules.alibi.slopes)
        keep = heads * sum(tile.scores for tile in tiles) <= _KEPT_BIASES
        biases = [tile.bias(rules, dtype, device) for tile in tiles] if keep else None
        return PagedCore(self, rules, tiles, biases)

    def _pieces(self) -> np.ndarray:
        """``[p, 4]``: of each text, or part of one, its number, its first row, how many, the first one's place.

        Several prompts that are short are cut into parts, of which those with as many keys are attended to together. A
        long one would have its keys gathered for each part.
        """
        texts = self.step.texts
        spans = texts.spans.cpu().numpy()
        several = int((spans[:, 1] > 1).sum()) > 1
        found = []
        for number, (first, count, start) in enumerate(spans.tolist()):
            cuts = [0, count]
            if self.apart:
                cuts[1:1] = range(texts.size - start % texts.size, count, texts.size)
            elif several and start + count <= _CUT:
                cuts[1:1] = range(QUERIES, count, QUERIES)
            found += [(number, first + at, end - at, start + at) for at, end in pairwise(cuts)]
        return np.array(found)

    def _together(self, pieces: np.ndarray) -> list[list[int]]:
        """The pieces that are attended to in one call: those of one row and of about as long texts, parts of prompts
        with as many rows and keys, or one alone."""
        if len(pieces) == 1 or self.apart:
            return [[piece] for piece in range(len(pieces))]
        found: list[list[int]] = []
        padding = longest = 0
        for piece in np.lexsort((-pieces[:, 3], pieces[:, 2] > 1)).tolist():
            count, place = pieces[piece, 2:].tolist()
            if count > 1:
                break
            padding += longest - place
            if not found or padding > _PADDED // self.cache.row_elements:
                found.append([])
                padding, longest = 0, place
            found[-1].append(piece)
        alike: dict[tuple[int, int], list[int]] = {}
        for piece in (pieces[:, 2] > 1).nonzero()[0].tolist():
            count, place = pieces[piece, 2:].tolist()
            rows = -(-count // ROUNDED) * ROUNDED
            alike.setdefault((rows, (place + rows - 1) // self.cache.size), []).append(piece)
        for (rows, last), own in alike.items():
            most = max(1, _SCORES // (rows * (last + 1) * self.cache.size))
            found += [own[at : at + most] for at in range(0, len(own), most)]
        return [sorted(own) for own in found]

    def _tile(self, pieces: np.ndarray, rules: AttentionRules, alone: bool) -> _Tile:
        text, first, count, start = pieces.T
        stop, size, device = start + count, self.cache.size, self.cache.device
        lowest = np.maximum(0, start - (rules.window or start.max() + 1) + 1)
        queries, last = int(count.max()), (stop - 1) // size
        if queries > 1:
            queries = -(-queries // ROUNDED) * ROUNDED
        # Shorter texts are padded with their own last block, whose keys are hidden: nobody reads those of others.
        most = int(((start + queries - 1) // size - lowest // size).max()) + 1
        numbers = np.minimum(lowest[:, None] // size + np.arange(most), last[:, None])
        blocks = self.step.texts.tables.cpu().numpy()[text[:, None], numbers].astype(np.int64)
        at: slice | Tensor
        if len(pieces) == queries == 1 and not self.apart and bool((np.diff(blocks) == 1).all()):
            length, begin = int(stop[0] - lowest[0]), int(blocks[0, 0] * size + lowest[0] % size)
            at = slice(begin, begin + length)
        else:
            at = self.cache.pages.blocks_of(torch.from_numpy(blocks).to(device))
            length, lowest = most * size, lowest - lowest % size
        rows = targets = None
        if not alone or bool((count < queries).any()):
            places, ends = first[:, None] + np.arange(queries), (first + count)[:, None]
            rows = torch.from_numpy(np.minimum(places, ends - 1)).to(device)
            targets = torch.from_numpy(np.where(places < ends, places, len(self.step.written)).ravel()).to(device)
        sees_all = rules.alibi is None and queries == 1 and bool((stop - lowest == length).all())
        sees_all = sees_all and (rules.window is None or rules.window >= length)
        return _Tile(rows, targets, at, start, lowest, queries, length, sees_all)


@dataclass(frozen=True)
class _Tile:
    """Queries that are attended to in one call, as many of each text.

    Attributes:
        rows: ``[b, c]`` of the step, a text's last one in place of further ones; None: all, in their order.
        targets: ``[b * c]`` where what they get belongs, behind the step's rows if nowhere.
        at: where their keys and values are, as :meth:`Pages.read` takes it.
        starts, firsts: ``[b]`` places in its text of each text's first query and first key.
        queries: rows of each text. length: keys of each.
        sees_all: every query sees every key, without a bias.
    """

    rows: Tensor | None
    targets: Tensor | None
    at: slice | Tensor
    starts: np.ndarray
    firsts: np.ndarray
    queries: int
    length: int
    sees_all: bool

    @property
    def scores(self) -> int:
        """Of a head."""
        return len(self.starts) * self.queries * self.length

    def bias(self, rules: AttentionRules, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        if self.sees_all:
            return None
        queries, keys = (
            torch.from_numpy(first[:, None] + np.arange(count)).to(device)
            for first, count in ((self.starts, self.queries), (self.firsts, self.length))
        )
        return span_bias(queries, keys, dtype, rules.window, rules.alibi)

    def attend(self, q: Tensor, keys: Pages, values: Pages, bias: Tensor | None, softcap: float | None) -> Tensor:
        """What the rows of the step's ``q [t, n, d]`` get, ``[b * c, n, d]``."""
        own = q if self.rows is None else q.index_select(0, self.rows.view(-1))
        k, v = (pages.read(self.at, q.dtype) for pages in (keys, values))
        return span_attention(own.unflatten(0, (len(self.starts), self.queries)), k, v, bias, softcap).flatten(0, 1)


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
        keys.write(self.batch.written, k[:, 0])
        values.write(self.batch.written, v[:, 0])
        q, r = q[:, 0], self.rules
        if self.tiles is None:
            found = paged_attention(q, keys.pages, values.pages, step.texts, r.window, r.alibi, r.softcap)
            return found.flatten(1).unsqueeze(1)
        out = q.new_zeros((len(q) + 1, *q.shape[1:])) if self.tiles[0].rows is not None else q  # no garbage is left
        for number, tile in enumerate(self.tiles):
            bias = tile.bias(r, q.dtype, q.device) if self.biases is None else self.biases[number]
            found = tile.attend(q, keys, values, bias, r.softcap)
            out = found if tile.targets is None else out.index_copy_(0, tile.targets, found)
        return out[: len(q)].flatten(1).unsqueeze(1)
