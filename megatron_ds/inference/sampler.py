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

import torch
from torch import Tensor

from megatron_ds import comm
from megatron_ds.inference.sampling_params import SamplingParams
from megatron_ds.kernels.dropout import COLUMN_STEP, mix
from megatron_ds.mesh import Axis
from megatron_ds.rng import derive_seed

_CANDIDATES = 1024
"""Most probable tokens of a rank among which the bound of top-p is looked for first."""


@dataclass(frozen=True)
class Row:
    """What the sampler must know of a sequence.

    Attributes:
        prompt, answer: its tokens. banned: tokens that are not allowed now. allowed: bool ``[v]`` of the whole
            vocabulary, those that are; None: all.
    """

    params: SamplingParams
    seed: int
    sample: int
    prompt: Sequence[int]
    answer: Sequence[int]
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

    def mask_padding(self, logits: Tensor) -> Tensor:
        """fp32 or wider, with the padding rows of the vocabulary impossible."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        logits[:, max(0, self.vocab_size - self.first) :] = -torch.inf
        return logits

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> Sampled:
        """``logits [r, v]`` are changed."""
        asked = [row.params.logprobs for row in rows]
        own = logits.clone() if any(count is not None for count in asked) else logits
        for index, row in enumerate(rows):
            self._process(logits[index], row)
        drawn = [index for index, row in enumerate(rows) if not row.params.greedy]
        scores = logits
        if drawn:
            kept = self._kept(logits[drawn], [rows[index].params for index in drawn])
            noisy = kept + torch.stack([self._noise(rows[index], kept) for index in drawn])
            scores = logits.index_copy(0, torch.tensor(drawn, device=logits.device), noisy)
            logits = logits.index_copy_(0, torch.tensor(drawn, device=logits.device), kept)
        tokens = self._argmax(scores)
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

    def _argmax(self, scores: Tensor) -> Tensor:
        """``[r]``: of equals the smallest id."""
        values, ids = scores.max(1)  # torch's, too, is the first of equals
        ids = ids + self.first
        if self.tp.size == 1:
            return ids
        every = self._gather(values.double())  # [tp, r]
        every_ids = self._gather(ids)
        best = every.max(0).values
        return every_ids.masked_fill(every != best, torch.iinfo(torch.int64).max).min(0).values

    def _gather(self, tensor: Tensor) -> Tensor:
        """``[tp, ...]`` of every rank's."""
        return comm.gather_dim0(tensor.unsqueeze(0).contiguous(), self.tp).wait()

    def _log_total(self, logits: Tensor) -> Tensor:
        """``[r]`` fp64: the logarithm of the sum of all exponentials, row by row: the same bits in any batch."""
        return self._gather(torch.stack([row.double().logsumexp(0) for row in logits])).logsumexp(0)

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

    # One row's rules

    def _process(self, logits: Tensor, row: Row) -> None:
        """``logits [v]`` in place: penalties, biases and what is not allowed."""
        params = row.params
        if params.repetition_penalty != 1.0:
            local = self._local({*row.prompt, *row.answer}, len(logits))
            of_seen = logits[local]
            factor = params.repetition_penalty
            logits[local] = torch.where(of_seen > 0, of_seen / factor, of_seen * factor)
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter(row.answer)
            for token in self._local(counts, len(logits)).tolist():
                logits[token] -= params.presence_penalty + params.frequency_penalty * counts[token + self.first]
        for token, bias in params.logit_bias.items():
            if 0 <= token - self.first < len(logits):
                logits[token - self.first] += bias
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
        bound = torch.full_like(scores[:, 0], -torch.inf)
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
            bound = torch.maximum(bound, highest + share.log())
        return scores.masked_fill(scores < bound.unsqueeze(1), -torch.inf)

    def _bound(self, scores: Tensor, tops: Sequence[int], masses: Sequence[float], count: int) -> Tensor:
        """``[r]``: the smallest score that top-k and top-p keep, found among ``count`` tokens of each rank."""
        values, _ = self._most_probable(scores, count)
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
        total = torch.where(everything, self._log_total(scores), inside.logsumexp(1))
        probabilities = (inside - total.unsqueeze(1)).exp()
        before = probabilities.cumsum(1) - probabilities
        kept = (before < mass.unsqueeze(1)).sum(1)
        reached = before[:, -1] + probabilities[:, -1] >= mass - 1e-12
        if bool((everything & ~reached & (mass < 1.0)).any()) and count < scores.shape[1]:
            return self._bound(scores, tops, masses, scores.shape[1])  # a flat distribution: among all tokens
        by_mass = values.gather(1, (kept - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        by_mass[mass >= 1.0] = -torch.inf
        return torch.maximum(by_count, by_mass)

    def _noise(self, row: Row, like: Tensor) -> Tensor:
        """``[v]`` Gumbel noise of this rank's tokens."""
        position = len(row.prompt) + len(row.answer)
        key = derive_seed(row.seed, "sample", row.sample, position)
        tokens = torch.arange(self.first, self.first + like.shape[1], device=like.device) * COLUMN_STEP
        high, low = (mix(((key >> shift) + tokens).to(torch.int32)).to(torch.int64) & 0x7FFFFFFF for shift in (0, 31))
        # 53 random bits, none of them all zeros: -log(-log(u)) is finite.
        uniform = (((high << 22) | (low & 0x3FFFFF)).double() + 0.5) * 2.0**-53
        return (-(-uniform.log()).log()).to(like.dtype)
