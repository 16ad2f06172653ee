"""The next tokens from logits that are split over the vocabulary, without gathering it.

A draw adds Gumbel noise to the scores and takes the largest, which chooses each token with its probability. The noise
of a token is a hash of (seed, sample, position, token): so a draw depends neither on the batch nor on the mesh, and a
rank needs its own part of the vocabulary alone. Top-k and top-p become a smallest score, found among the most probable
tokens of all ranks.

Shapes: ``r`` rows, ``v`` tokens of the vocabulary on this rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_ds import comm
from megatron_ds.inference.sampling_params import SamplingParams
from megatron_ds.kernels.dropout import COLUMN_STEP, mix
from megatron_ds.mesh import Axis
from megatron_ds.rng import derive_seed

_CANDIDATES = 1024
"""Most probable tokens of a rank among which the bound of top-p is looked for first."""
_DRAWN_FROM = 8
"""Tokens of a row whose noise is computed first."""


class Row(NamedTuple):
    """What the sampler must know of a sequence.

    Attributes:
        tokens: of the prompt, so many, and of the answer. banned: tokens that are not allowed now. allowed: bool
            ``[v]`` of the whole vocabulary, those that are; None: all.
    """

    params: SamplingParams
    seed: int
    sample: int
    tokens: Sequence[int]
    prompt: int
    banned: Sequence[int] = ()
    allowed: Tensor | None = None


@dataclass
class Sampled:
    """Of each row the token, and log-probabilities by token where they were asked for: of the model, and processed."""

    tokens: list[int]
    logprobs: list[dict[int, float] | None] = field(default_factory=list)
    processed: list[dict[int, float] | None] = field(default_factory=list)


class Sampler:
    """Of a vocabulary split over ``tp``, whose part here begins at token ``first``."""

    def __init__(self, tp: Axis, first: int, vocab_size: int):
        self.tp, self.first, self.vocab_size = tp, first, vocab_size
        self._columns: Tensor | None = None

    def mask_padding(self, logits: Tensor) -> Tensor:
        """fp32 or wider, with the padding rows of the vocabulary impossible."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if self.first + logits.shape[1] > self.vocab_size:
            logits[:, max(0, self.vocab_size - self.first) :] = -torch.inf
        return logits

    def most_probable(self, logits: Tensor) -> list[int]:
        """Of each row of ``logits [r, v]``, as :meth:`sample` chooses where no more is asked for."""
        return self._largest(*self._max(logits)).tolist()

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> Sampled:
        """``logits [r, v]`` are changed."""
        asked = [row.params.logprobs for row in rows]
        own = logits.clone() if any(count is not None for count in asked) else logits
        for index, row in enumerate(rows):
            if not row.params.keeps_logits or row.banned or row.allowed is not None:
                self._process(logits[index], row)
        drawn = [index for index, row in enumerate(rows) if not row.params.greedy]
        if len(drawn) < len(rows):
            values, ids = self._max(logits)
        else:
            values, ids = logits.new_empty(len(rows)), logits.new_empty(len(rows), dtype=torch.int64)
        if drawn:
            at = torch.tensor(drawn, device=logits.device)
            kept = self._kept(
                logits if len(drawn) == len(rows) else logits[at], [rows[index].params for index in drawn]
            )
            values[at], ids[at] = self._draws(kept, [rows[index] for index in drawn])
            if kept is not logits:
                logits = logits.index_copy_(0, at, kept)
        tokens = self._largest(values, ids)
        return Sampled(
            tokens.tolist(),
            self.logprobs(own, tokens, asked),
            self.logprobs(logits, tokens, [row.params.processed_logprobs for row in rows]),
        )

    def logprobs(self, logits: Tensor, tokens: Tensor, counts: Sequence[int | None]) -> list[dict[int, float] | None]:
        """Of each row that asks: of its token, then of its ``count`` most probable ones."""
        wanted = [index for index, count in enumerate(counts) if count is not None]
        found: list[dict[int, float] | None] = [None] * len(counts)
        if not wanted:
            return found
        logits, tokens = logits[wanted], tokens[wanted]
        log_total = self._log_total(logits)
        chosen = self._values_at(logits, tokens) - log_total
        values, ids = self._most_probable(logits, max(counts[index] or 0 for index in wanted))
        values = values - log_total.unsqueeze(1)
        for place, index in enumerate(wanted):
            of_row = {int(tokens[place]): float(chosen[place])}
            count = counts[index] or 0
            for token, value in zip(ids[place, :count].tolist(), values[place, :count].tolist()):
                if value > -torch.inf:  # the others are not possible
                    of_row.setdefault(token, value)
            found[index] = of_row
        return found

    # Over the ranks

    def _max(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """``[r]`` of ``[r, v]``: the largest of a row, where there are ranks to compare it with, and its place,
        of equals the first."""
        if logits.device.type != "cpu":
            return logits.max(1)
        ids = torch.from_numpy(logits.numpy().argmax(1))  # in a tenth of the time
        if self.tp.size == 1:
            return logits.new_empty(len(ids)), ids
        return logits.gather(1, ids.unsqueeze(1)).squeeze(1), ids

    def _largest(self, values: Tensor, ids: Tensor) -> Tensor:
        """``[r]``: the token of the largest of all ranks' ``values [r]``, each at ``ids [r]``; of equals the first."""
        if self.tp.size == 1:
            return ids
        every = self._gather(values.double())  # [tp, r]
        every_ids = self._gather(ids + self.first)
        best = every.max(0).values
        return every_ids.masked_fill(every != best, torch.iinfo(torch.int64).max).min(0).values

    def _gather(self, tensor: Tensor) -> Tensor:
        """``[tp, ...]`` of every rank's."""
        return comm.gather_dim0(tensor.unsqueeze(0).contiguous(), self.tp).wait()

    def _log_total(self, logits: Tensor) -> Tensor:
        """``[r]`` fp64: the logarithm of the sum of all exponentials, row by row: the same bits in any batch."""
        most = logits.max(1).values.clamp(min=torch.finfo(logits.dtype).min)
        sums = torch.stack([(row - top).exp_().sum(dtype=torch.float64) for row, top in zip(logits, most)])
        return self._gather(sums.log() + most).logsumexp(0)

    def _values_at(self, logits: Tensor, tokens: Tensor) -> Tensor:
        local = tokens.to(logits.device) - self.first
        there = (local >= 0) & (local < logits.shape[1])
        values = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        return self._gather(values.masked_fill(~there, -torch.inf)).max(0).values

    def _most_probable(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Scores and ids ``[r, >= count]``, the largest first."""
        values, ids = logits.topk(min(count, logits.shape[1]), dim=1)
        if self.tp.size > 1:
            values, ids = (self._gather(x).transpose(0, 1).flatten(1) for x in (values, ids + self.first))
            values, order = values.sort(dim=1, descending=True)
            ids = ids.gather(1, order)
        return values, ids

    def _top_values(self, scores: Tensor, count: int) -> Tensor:
        """``[r, tp * count]``: the largest scores of every rank, the largest first."""
        if scores.device.type == "cpu":  # by numpy in a sixth of the time
            found = torch.from_numpy(np.partition(scores.numpy(), -count, axis=1)[:, -count:])
        else:
            found = scores.topk(count).values
        every = found if self.tp.size == 1 else self._gather(found).transpose(0, 1).flatten(1)
        return every.sort(dim=1, descending=True).values

    # One row's rules

    def _process(self, logits: Tensor, row: Row) -> None:
        """``logits [v]`` in place: biases, penalties and what is not allowed."""
        params = row.params
        for token, bias in params.logit_bias.items():  # first: a penalty that multiplies acts on what it adds as well
            if 0 <= token - self.first < len(logits):
                logits[token - self.first] += bias
        if params.repetition_penalty != 1.0:
            local = self._local(set(row.tokens), len(logits))
            of_seen = logits[local]
            factor = params.repetition_penalty
            logits[local] = torch.where(of_seen > 0, of_seen / factor, of_seen * factor)
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter(row.tokens[row.prompt :])
            for token in self._local(counts, len(logits)).tolist():
                logits[token] -= params.presence_penalty + params.frequency_penalty * counts[token + self.first]
        if row.banned:
            logits[self._local(row.banned, len(logits))] = -torch.inf
        if row.allowed is not None:
            own = row.allowed[self.first : self.first + len(logits)].to(logits.device)
            logits[: len(own)].masked_fill_(~own, -torch.inf)
        if not params.greedy:
            logits /= params.temperature

    def _local(self, tokens: Sequence[int] | set[int] | Counter[int], width: int) -> Tensor:
        """Which of the ``width`` tokens of this rank they are."""
        return torch.tensor([t - self.first for t in sorted(tokens) if 0 <= t - self.first < width], dtype=torch.int64)

    def _kept(self, scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        """``scores [r, v]`` with -inf where top-k, top-p and min-p leave a token out."""
        bound: Tensor | None = None
        whole = scores.shape[1] * self.tp.size
        tops = [p.top_k if 0 < p.top_k < whole else whole for p in params]
        cut = [p.top_p < 1.0 for p in params]
        if any(top < whole for top in tops) or any(cut):
            most = max((top for top in tops if top < whole), default=1)
            count = min(max(most, _CANDIDATES if any(cut) else 1), scores.shape[1])
            bound = self._bound(scores, tops, [p.top_p for p in params], count)
        if any(p.min_p > 0.0 for p in params):
            highest = self._gather(scores.max(1).values).max(0).values
            share = scores.new_tensor([p.min_p for p in params])
            smallest = highest + share.log()
            bound = smallest if bound is None else torch.maximum(bound, smallest)
        return scores if bound is None else scores.masked_fill(scores < bound.unsqueeze(1), -torch.inf)

    def _bound(self, scores: Tensor, tops: Sequence[int], masses: Sequence[float], count: int) -> Tensor:
        """``[r]``: the smallest score that top-k and top-p keep, found among ``count`` tokens of each rank."""
        values = self._top_values(scores, count)
        width = values.shape[1]
        at = values.device
        places = torch.arange(width, device=at).expand_as(values)
        limits = torch.tensor([min(top, width) for top in tops], device=at).unsqueeze(1)
        by_count = values.gather(1, limits - 1).squeeze(1)
        by_count[torch.tensor([top > width for top in tops], device=at)] = -torch.inf
        mass = torch.tensor(masses, dtype=torch.float64, device=at)
        # Of what top-k leaves, and of everything where it leaves all.
        inside = values.masked_fill(places >= limits, -torch.inf).double()
        everything = torch.tensor([top > width for top in tops], device=at)
        total = inside.logsumexp(1)
        if bool(everything.any()):
            total = torch.where(everything, self._log_total(scores), total)
        probabilities = (inside - total.unsqueeze(1)).exp()
        before = probabilities.cumsum(1) - probabilities
        kept = (before < mass.unsqueeze(1)).sum(1)
        reached = before[:, -1] + probabilities[:, -1] >= mass - 1e-12
        if bool((everything & ~reached & (mass < 1.0)).any()) and count < scores.shape[1]:
            return self._bound(scores, tops, masses, scores.shape[1])  # a flat distribution: among all tokens
        by_mass = values.gather(1, (kept - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        by_mass[mass >= 1.0] = -torch.inf
        return torch.maximum(by_count, by_mass)

    def _draws(self, scores: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """``[r]``: the largest of ``scores [r, v]`` with their noise, and their places.

        The noise is at most ``-log(1 - u)``, as ``-log(u) >= 1 - u``. It is computed of the tokens that may reach
        highest by this bound, and of all others only where one of them might reach higher.
        """
        keys = [derive_seed(row.seed, "sample", row.sample, len(row.tokens)) for row in rows]
        columns = self._hashed_columns(scores)
        bounds = torch.stack([of_row - _one_minus(key, columns).log_() for of_row, key in zip(scores, keys)])
        reach, places = bounds.topk(min(_DRAWN_FROM, scores.shape[1]))
        exact = scores.gather(1, places) + self._noise(keys, places.cpu().numpy(), scores)
        values, ids = _first_largest(exact, places)
        slack = 1e-3 + 1e-6 * values.abs()  # what is lost in rounding
        for row in (~(reach[:, -1] < values - slack)).nonzero().flatten().tolist():
            noise = self._noise(keys[row : row + 1], np.arange(scores.shape[1])[None], scores)
            values[row], ids[row] = (scores[row] + noise[0]).max(0)
        return values, ids

    def _hashed_columns(self, scores: Tensor) -> Tensor:
        """``[v]`` int32: the tokens of this rank's part, as a hash takes them."""
        if self._columns is None or (len(self._columns), self._columns.device) != (scores.shape[1], scores.device):
            tokens = torch.arange(self.first, self.first + scores.shape[1], device=scores.device)
            self._columns = (tokens * COLUMN_STEP).to(torch.int32)
        return self._columns

    def _noise(self, keys: Sequence[int], places: np.ndarray, like: Tensor) -> Tensor:
        """``[r, n]`` Gumbel noise ``-log(-log(u))`` of tokens at places of this rank's part, ``u`` being a hash.

        By numpy, whose operators are called in a tenth of the time: they are as many for one token as for thousands.
        """
        columns, own = (self.first + places) * COLUMN_STEP, np.array(keys)[:, None]
        high, low = (
            mix(((own >> shift) + columns).astype(np.int32)).astype(np.int64) & 0x7FFFFFFF for shift in (0, 31)
        )
        # 53 random bits, none of them all zeros: -log(-log(u)) is finite.
        uniform = (((high << 22) | (low & 0x3FFFFF)).astype(np.float64) + 0.5) * 2.0**-53
        return torch.from_numpy(-np.log(-np.log(uniform))).to(like)


def _first_largest(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``[r]`` of ``[r, n]`` each; of equal values the smallest id."""
    best = values.max(1, keepdim=True).values
    return best[:, 0], ids.masked_fill(values != best, torch.iinfo(ids.dtype).max).min(1).values


def _one_minus(key: int, hashed: Tensor) -> Tensor:
    """``1 - u`` of the draws ``u``, rounded down to 31 bits, fp32."""
    bits = mix(hashed + (((key + 0x80000000) & 0xFFFFFFFF) - 0x80000000))  # the key's lowest 32 bits, with a sign
    return (0x7FFFFFFF - (bits & 0x7FFFFFFF)).to(torch.float32).mul_(2.0**-31)
