"""Attention by blocks of queries, in plain torch: memory grows with the sequence and not with its square.

One block of queries at a time is multiplied with all the keys it may see. Causality, documents, sliding windows, ALiBi,
soft caps and dropout are applied to the block's scores, and no larger score matrix or mask is ever made. Key and value
heads are not repeated: the queries of a group are rows of one matmul.

On a CPU this is mostly the fast way too, see :mod:`.cpu.attention_route`.

Shapes: ``s`` sequence, ``b`` batch, ``n`` query heads, ``g`` key/value heads, ``d`` head dim; of one tile ``B``
samples, ``Q`` queries and ``K`` keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ds.kernels.alibi import Alibi
from megatron_ds.kernels.autograd import first_derivative_only
from megatron_ds.kernels.cpu import attention_route
from megatron_ds.kernels.documents import Documents
from megatron_ds.kernels.dropout import keep_mask
from megatron_ds.kernels.softmax import SOFTMAX, scaled_masked_softmax

_PRODUCTS = 4  # of half precision, that are summed in it: their error stays near that of one rounding


@dataclass(frozen=True)
class Dropout:
    """Dropout of attention probabilities, decided by counters as in :mod:`.dropout`.

    Attributes:
        p: probability of dropping an element; those kept are scaled by ``1 / (1 - p)``.
        row_keys: ``[s, b]`` int32, one for each query and sample.
        first_head: number of this rank's first head in the whole model. Within a row an element is (global head, key).
    """

    p: float
    row_keys: Tensor
    first_head: int = 0


def keeps_probabilities(length: int, head_dim: int) -> bool:
    """Whether probabilities stay for the backward pass: where a row of them is no longer than an MLP's activations."""
    return length <= 4 * head_dim


def block_size(device: torch.device) -> int:
    """Queries a block. On a GPU the number of launches counts."""
    return attention_route.QUERIES if device.type == "cpu" else 512


def is_preferred(on_cpu: bool, dtype: torch.dtype, keeps: bool, causal: bool, other_rules: bool, alone: bool) -> bool:
    """Whether attention goes by blocks of queries, and not to torch's fused kernel.

    Dropout and soft caps always do: a fused kernel drops in ways that depend on the mesh, and caps nothing.

    Args:
        dtype: of the inputs.
        keeps: :func:`keeps_probabilities`.
        other_rules: documents, ALiBi, a window. alone: what blocks alone can do: dropout or a soft cap.
    """
    return alone or (on_cpu and attention_route.prefers_blocks(dtype, keeps, causal, other_rules))


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    documents: Documents | None = None,
    alibi: Alibi | None = None,
    dropout: Dropout | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``dropout(softmax(q k^T / sqrt(d) + bias)) v`` over the keys that a query may see.

    Scores are rounded to the inputs' dtype before the softmax, which computes in fp32; those of fp16, which ends at
    65,504, are fp32 themselves. Where :func:`keeps_probabilities` says no, the backward pass computes them again.

    Args:
        q: ``[s, b, n, d]``, any strides.
        k, v: ``[s, b, g, d]``, any strides; query head ``h`` uses key/value head ``h // (n / g)``.
        causal: whether a query sees itself and those before it only.
        documents: a query sees its own document only.
        alibi: the biases of the ``n`` heads.
        window: a query sees only the keys that are fewer places than this away from it.
        softcap: scores are ``softcap * tanh(scores / softcap)`` (Gemma 2, section 2).

    Returns:
        ``[s, b, n * d]``.
    """
    starts, ends = (None, None) if documents is None else (documents.starts, documents.ends)
    p, row_keys, first_head = (0.0, None, 0) if dropout is None else (dropout.p, dropout.row_keys, dropout.first_head)
    slopes, rounded = (None, None) if alibi is None else (alibi.slopes, alibi.rounded)
    rules = (starts, ends, slopes, rounded, row_keys, p, first_head, causal, window, softcap)
    out: Tensor = _BlockAttention.apply(q, k, v, *rules)
    return out


@dataclass(frozen=True)
class _Tile:
    """Some consecutive queries of some consecutive samples, and the consecutive keys that they may see.

    Attributes:
        crosses: whether the queries are, or may be, of more than one document.
    """

    samples: slice
    queries: slice
    keys: slice
    crosses: bool

    def of(self, tensor: Tensor, batch: int, places: slice) -> Tensor:
        """``[b * heads, s, d] -> [B * heads, len(places), d]``, a view."""
        heads = tensor.shape[0] // max(1, batch)
        return tensor[self.samples.start * heads : self.samples.stop * heads, places]

    def is_inside(self, other: _Tile) -> bool:
        """Whether it is of the same samples, and its keys are among the other's."""
        own, others = self.keys, other.keys
        return self.samples == other.samples and others.start <= own.start and own.stop <= others.stop


@dataclass(frozen=True)
class _Scores:
    """How scores become probabilities, in the forward pass and again in the backward pass."""

    device: torch.device
    shape: torch.Size  # of q
    starts: Tensor | None
    ends: Tensor | None
    slopes: Tensor | None
    rounded: float | None
    row_keys: Tensor | None
    p: float
    first_head: int
    causal: bool
    window: int | None
    softcap: float | None

    @property
    def kept(self) -> bool:
        """Whether probabilities stay for the backward pass, which needs the scores themselves where they are capped."""
        return self.softcap is None and keeps_probabilities(self.shape[0], self.shape[3])

    def tiles(self) -> Iterator[_Tile]:
        """From the first queries to the last."""
        s, b, size = *self.shape[:2], block_size(self.device)
        if self.starts is None or self.ends is None or self.device.type != "cpu":
            for start in range(0, s, size):
                end = min(start + size, s)
                yield _Tile(slice(0, b), slice(start, end), self._near(start, end, 0, s), self.starts is not None)
            return
        # The bounds are at hand, so keys that no query of a tile may see are left out.
        last = [min(start + size, s) - 1 for start in range(0, s, size)]
        bounds = zip(self.starts[:, ::size].tolist(), self.starts[:, last].tolist(), self.ends[:, last].tolist())
        for sample, row in enumerate(bounds):
            for start, first_key, last_start, last_end in zip(range(0, s, size), *row):
                end = min(start + size, s)
                keys = self._near(start, end, first_key, last_end)
                yield _Tile(slice(sample, sample + 1), slice(start, end), keys, last_start != first_key)

    def _near(self, start: int, end: int, first_key: int, last_key: int) -> slice:
        """Of the keys ``first_key .. last_key`` those that a query of ``start .. end`` may see."""
        reach = last_key if self.window is None else self.window - 1
        return slice(max(first_key, start - reach), end if self.causal else min(last_key, end + reach))

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """``[B * g, n / g * Q, K]`` of grouped queries and of keys from :func:`_for_scores`, capped."""
        scores = queries.to(keys.dtype) @ keys.transpose(1, 2)
        return scores if self.softcap is None else scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope_of_cap(self, scores: Tensor) -> Tensor | None:
        """The derivative of the capped scores with respect to the others."""
        return None if self.softcap is None else 1.0 - (scores / self.softcap).square_()

    def probabilities(self, scores: Tensor, tile: _Tile, dtype: torch.dtype) -> Tensor:
        """``[B * g, n / g * Q, K]`` of :meth:`scores`, which are overwritten. Negative: dropped."""
        b, size, seen = (part.stop - part.start for part in (tile.samples, tile.queries, tile.keys))
        by_head = scores.view(b, self.shape[2], size, seen)
        if self.row_keys is None:
            return self._softmax(by_head, tile).to(dtype).view(scores.shape)
        if SOFTMAX.choose(by_head) == "triton" and self.rounded is None:
            hidden = self._hidden(tile)
            mask = None if hidden is None else ~hidden
            weights = scaled_masked_softmax(by_head, causal=self.causal, mask=mask, slopes=self.slopes).to(dtype)
        else:
            weights = self._softmax(by_head, tile).to(dtype)
        return torch.where(self._kept(tile, self.row_keys), weights, -weights).view(scores.shape)

    def _softmax(self, scores: Tensor, tile: _Tile) -> Tensor:
        """``[B, n, Q, K]``, in fp32 with ALiBi; ``scores`` are overwritten."""
        if self.slopes is not None:
            wide = torch.promote_types(scores.dtype, torch.float32)
            places = self._places(tile, self.slopes.device)
            scores = scores.to(wide).add_(Alibi(self.slopes, self.rounded).bias(*places, wide))
        # Adding -inf is one vectorised pass; masked_fill is not.
        if self.causal:
            own, size = scores[..., tile.queries.start - tile.keys.start :], scores.shape[2]
            own += own.new_full((size, size), float("-inf")).triu_(1)
        hidden = self._hidden(tile)
        if hidden is not None:
            scores += scores.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        return scores.softmax(-1)

    def _places(self, tile: _Tile, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of the queries ``[Q]`` and of the keys ``[K]``."""
        queries, keys = (torch.arange(p.start, p.stop, device=device) for p in (tile.queries, tile.keys))
        return queries, keys

    def _hidden(self, tile: _Tile) -> Tensor | None:
        """``[B or 1, 1, Q, K]`` bool: the keys of another document or outside the window; None if there are none."""
        farthest = max(tile.queries.stop - tile.keys.start, tile.keys.stop - tile.queries.start) - 1
        if self.window is None or farthest < self.window:
            return self._other_documents(tile) if tile.crosses else None
        queries, keys = self._places(tile, self.device)
        outside = (keys - queries.unsqueeze(1)).abs() >= self.window
        return outside[None, None] | self._other_documents(tile) if tile.crosses else outside[None, None]

    def _other_documents(self, tile: _Tile) -> Tensor:
        """``[B, 1, Q, K]`` bool: whether the key is of another document than the query."""
        assert self.starts is not None and self.ends is not None
        starts, ends = (t[tile.samples, tile.queries].unsqueeze(-1) for t in (self.starts, self.ends))
        keys = torch.arange(tile.keys.start, tile.keys.stop, device=starts.device)
        return (keys < starts if self.causal else (keys < starts) | (keys >= ends)).unsqueeze(1)

    def _kept(self, tile: _Tile, row_keys: Tensor) -> Tensor:
        """``[B, n, Q, K]`` bool: the elements that dropout keeps."""
        s, _, n, _ = self.shape
        rows = row_keys.t()[tile.samples, None, tile.queries].expand(-1, n, -1).contiguous()
        heads = torch.arange(self.first_head, self.first_head + n, device=rows.device)
        keys = torch.arange(tile.keys.start, tile.keys.stop, device=rows.device)
        return keep_mask(rows, (keys + heads.unsqueeze(1) * s).unsqueeze(1), self.p)

    def dropped(self, probabilities: Tensor) -> Tensor:
        """What the values are multiplied with."""
        return probabilities if self.row_keys is None else probabilities.relu().mul_(1.0 / (1.0 - self.p))

    def before_dropout(self, grad: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the probabilities, and they themselves, from the gradient of :meth:`dropped`."""
        if self.row_keys is None:
            return grad, probabilities
        return grad.mul_((probabilities > 0).to(grad.dtype)).mul_(1.0 / (1.0 - self.p)), probabilities.abs()


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rules: Any) -> Tensor:
        s, b, n, d = q.shape
        ctx.scale, ctx.scores, ctx.group = 1.0 / math.sqrt(d), _Scores(q.device, q.shape, *rules), n // k.shape[2]
        # The scale goes into the queries, the smallest tensor it can go into.
        queries, keys, values = _heads(q).mul_(ctx.scale), _heads(k), _heads(v)
        out = q.new_empty(s, b, n, d)
        by_head = out.permute(1, 2, 0, 3)  # [b, n, s, d]
        kept, wide_keys = [], _for_scores(keys)
        for tile in ctx.scores.tiles():
            own = _grouped(tile.of(queries, b, tile.queries), ctx.group)
            scores = ctx.scores.scores(own, tile.of(wide_keys, b, tile.keys))
            probabilities = ctx.scores.probabilities(scores, tile, q.dtype)
            part = ctx.scores.dropped(probabilities) @ tile.of(values, b, tile.keys)
            by_head[tile.samples, :, tile.queries] = part.view(-1, n, own.shape[1] // ctx.group, d)
            if ctx.scores.kept:
                kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, *kept)
        return out.view(s, b, n * d)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, *kept = ctx.saved_tensors
        (s, b, n, d), group = ctx.scores.shape, ctx.group
        grad = _heads(grads[0].view(s, b, n, d))
        grad_q = grad.new_empty(s, b, n, d)
        grad_queries = grad_q.permute(1, 2, 0, 3)
        grad_keys, grad_values = _SumOfTiles(keys), _SumOfTiles(values)
        wide_keys = keys if kept else _for_scores(keys)
        # The last tile comes first: where it sees all keys, it begins the sums.
        for number, tile in reversed(list(enumerate(ctx.scores.tiles()))):
            own, own_grad = (_grouped(tile.of(t, b, tile.queries), group) for t in (queries, grad))
            seen = tile.of(keys, b, tile.keys)
            slope = None
            if kept:
                p = kept[number]
            else:
                scores = ctx.scores.scores(own, tile.of(wide_keys, b, tile.keys))
                slope = ctx.scores.slope_of_cap(scores)
                p = ctx.scores.probabilities(scores, tile, keys.dtype)
            grad_values.add(tile, b, ctx.scores.dropped(p).transpose(1, 2), own_grad)
            grad_p, p = ctx.scores.before_dropout(own_grad @ tile.of(values, b, tile.keys).transpose(1, 2), p)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            if slope is not None:
                grad_scores.mul_(slope)
            part = (grad_scores @ seen).mul_(ctx.scale)
            grad_queries[tile.samples, :, tile.queries] = part.view(-1, n, own.shape[1] // group, d)
            grad_keys.add(tile, b, grad_scores.transpose(1, 2), own)
        grad_k, grad_v = (t.whole(b).view(b, n // group, s, d).permute(2, 0, 1, 3) for t in (grad_keys, grad_values))
        return grad_q, grad_k, grad_v, *[None] * 10


class _SumOfTiles:
    """The gradient of keys or values ``like [b * g, s, d]``: a sum of products over tiles.

    Half precision: a few products in a row are summed where they are multiplied, and rounded each time; those sums are
    added in fp32. To add every product in fp32 takes as long as to multiply.
    """

    def __init__(self, like: Tensor):
        self.like = like
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.total: Tensor | None = None
        self.part: Tensor | None = None  # [B * g, K, d], the sum of `count` products, for the keys of the first tile
        self.first: _Tile | None = None
        self.count = 0

    def add(self, tile: _Tile, batch: int, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right`` (``[B * g, K, rows] @ [B * g, rows, d]``) to the tile's keys."""
        if left.dtype == self.dtype:
            if self.total is None and left.shape[:2] == self.like.shape[:2]:
                self.total = left @ right
            else:
                self._of_total(tile, batch).baddbmm_(left, right)
        elif self.part is not None and self.first is not None and self.count < _PRODUCTS and tile.is_inside(self.first):
            begin = tile.keys.start - self.first.keys.start
            self.part.narrow(1, begin, left.shape[1]).baddbmm_(left, right)
            self.count += 1
        else:
            self._add_part(batch)
            self.part, self.first, self.count = left @ right, tile, 1

    def whole(self, batch: int) -> Tensor:
        if self.total is None and self.part is not None and self.part.shape == self.like.shape:
            return self.part
        self._add_part(batch)
        return torch.zeros_like(self.like) if self.total is None else self.total.to(self.like.dtype)

    def _add_part(self, batch: int) -> None:
        if self.part is not None and self.first is not None:
            self._of_total(self.first, batch).add_(self.part)
            self.part = self.first = None

    def _of_total(self, tile: _Tile, batch: int) -> Tensor:
        if self.total is None:
            self.total = torch.zeros_like(self.like, dtype=self.dtype)
        return tile.of(self.total, batch, tile.keys)


def _heads(tensor: Tensor) -> Tensor:
    """``[s, b, heads, d] -> [b * heads, s, d]``, a new contiguous tensor."""
    s, b, heads, d = tensor.shape
    new = tensor.new_empty(b, heads, s, d)
    new.copy_(tensor.permute(1, 2, 0, 3))
    return new.view(b * heads, s, d)


def _grouped(tile: Tensor, group: int) -> Tensor:
    """``[B * n, Q, d] -> [B * g, n / g * Q, d]``: the queries of a key/value head as rows of one matrix."""
    return tile if group == 1 else tile.reshape(tile.shape[0] // group, group * tile.shape[1], tile.shape[2])


def _for_scores(keys: Tensor) -> Tensor:
    """The keys in the dtype that scores are computed in."""
    return keys.float() if keys.dtype == torch.float16 else keys
