"""Which tokens of which sequences the next step computes: continuous batching with chunked prefill.

Each step takes the tokens that running sequences have pending, one in decoding, and fills what is left of its budget
with prompts, which may be cut into chunks. Where blocks run out, the youngest sequence gives up its own and is computed
again later (preemption by recomputation); the oldest one is never asked to, so that something always ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_ds.errors import ConfigError
from megatron_ds.inference.block_pool import BlockPool
from megatron_ds.inference.sequence import Sequence, Status

_PROMPT_LOGPROBS_ROWS = 256
"""Tokens of a chunk whose logits are all wanted: they are whole rows of the vocabulary."""


@dataclass(slots=True)  # not frozen: that would take longer to make
class Span:
    """Tokens ``start`` to ``start + count`` of a sequence, of which the last are a guess where there is a ``draft``."""

    sequence: Sequence
    start: int
    count: int
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.start + self.count], *self.draft]

    @property
    def is_last(self) -> bool:
        """Whether the next token follows from it."""
        return self.start + self.count - len(self.draft) == len(self.sequence.tokens)


@dataclass
class Plan:
    """One step.

    Attributes:
        copies: (from, to) of blocks, before anything is written. fresh: blocks filled in part.
        admitted: the spans of sequences that have begun with it. decodes: each span is the last token of its sequence,
            and no guess.
    """

    spans: list[Span] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    admitted: list[Span] = field(default_factory=list)
    decodes: bool = True

    @property
    def tokens(self) -> int:
        return sum(span.count for span in self.spans)


def require_budget(seats: int, budget: int, size: int) -> None:
    """Raises :class:`ConfigError` where a step could hold no block of ``size`` tokens of a prompt."""
    if seats < 1 or size < 1 or budget < seats + size:
        raise ConfigError(
            f"max_num_batched_tokens={budget} is less than max_num_seqs={seats} and a block of {size} tokens: prompts "
            f"might wait for ever; give {max(seats, 1) + max(size, 1)} at least, or fewer sequences"
        )


class Batcher:
    """Queue, seats and blocks of all sequences.

    Args:
        seats: sequences that run at one time at most.
        budget: tokens of a step at most.
        drafts: tokens that are guessed at most for a sequence and a step.

    A chunk of a prompt ends where a block does. So which tokens are computed together with a token, in its own
    sequence, does not depend on what else runs, and neither does its result, bit for bit, where the kernels allow it.
    """

    def __init__(self, pool: BlockPool, seats: int, budget: int, drafts: int = 0):
        require_budget(seats, budget, pool.size)
        self.pool, self.seats, self.budget, self.drafts = pool, seats, budget, drafts
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.guesses: dict[tuple[str, int], list[int]] | None = None  # of a draft model; None: what came before is

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def fork(self, sequence: Sequence, sample: Sequence) -> None:
        """Another sample of the same prompt, which ``sequence`` has computed: it shares its blocks until it writes."""
        prompt = len(sequence.request.tokens)
        count = self.pool.needed(prompt)
        if sequence.computed >= prompt and len(sequence.blocks) >= count:
            sample.blocks, sample.computed = sequence.blocks[:count], prompt - 1
            sample.digests = sequence.digests[: (prompt - 1) // self.pool.size]
            self.pool.hold(sample.blocks)
        self.waiting.append(sample)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """It runs no more, whether it waited or ran."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status, sequence.reason = Status.FINISHED, reason
        self._give_back(sequence)

    def plan(self) -> Plan:
        plan, left, index = Plan(), self.budget, 0
        preempted, pool = False, self.pool
        while index < len(self.running):
            sequence = self.running[index]
            start = sequence.computed
            pending = len(sequence.tokens) - start
            if pending == 1 and left and not self.drafts and pool.has_room(sequence.blocks, start):  # as nearly always
                plan.spans.append(Span(sequence, start, 1))
                left, index = left - 1, index + 1
                continue
            count = self._count(sequence, left)
            if count and not self._reserve(sequence, count, plan):
                preempted = True
                self._make_room()
                continue
            if count:
                draft = self._draft(sequence, left - count, plan) if self.drafts and sequence.pending == 1 else ()
                plan.spans.append(Span(sequence, sequence.computed, count + len(draft), draft))
                plan.decodes = plan.decodes and pending == 1 and not draft
                left -= count + len(draft)
            index += 1
        while self.waiting and not preempted and len(self.running) < self.seats:
            count = self._admit(self.waiting[0], left, plan)
            if not count:
                break
            sequence = self.waiting.popleft()
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            plan.admitted.append(Span(sequence, sequence.computed, count))
            plan.decodes = plan.decodes and sequence.pending == 1
            left -= count
        plan.spans += plan.admitted
        return plan

    def _draft(self, sequence: Sequence, left: int, plan: Plan) -> tuple[int, ...]:
        """A guess of the next tokens, where there is room for them that nobody waits for."""
        most = min(self.drafts, left, sequence.room - 1)
        draft: tuple[int, ...] = ()
        if most > 0 and not self.waiting and self.guesses is None:
            draft = guess(sequence.tokens, most)
        elif most > 0 and not self.waiting and self.guesses is not None:
            draft = tuple(self.guesses.get((sequence.request.id, sequence.index), ())[:most])
        return draft if draft and self._reserve(sequence, 1 + len(draft), plan) else ()

    def computed(self, spans: Iterable[Span]) -> None:
        """The keys and values of the spans' tokens are in the blocks of their sequences, but for those of guesses."""
        for span in spans:
            span.sequence.computed += span.count - len(span.draft)
            if self.pool.share:
                self._publish(span.sequence)

    def guessed(self, sequence: Sequence) -> None:
        """So are those of one more of its tokens, which was guessed."""
        sequence.computed += 1
        if self.pool.share:
            self._publish(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """From now on others may take its blocks that are full."""
        pool = self.pool
        while (len(sequence.digests) + 1) * pool.size <= sequence.computed:
            number = len(sequence.digests)
            digest = self._digest(sequence, number, sequence.digests[-1] if number else b"")
            sequence.digests.append(digest)
            pool.publish(sequence.blocks[number], digest)

    def _digest(self, sequence: Sequence, number: int, before: bytes) -> bytes:
        size = self.pool.size
        return self.pool.hash_of(before, sequence.tokens[number * size : (number + 1) * size])

    def _count(self, sequence: Sequence, left: int) -> int:
        pending = len(sequence.tokens) - sequence.computed
        if pending == 1:
            return min(1, left)
        of_prompt = sequence.computed < len(sequence.request.tokens)
        if of_prompt and sequence.request.params.prompt_logprobs is not None:
            left = min(left, max(_PROMPT_LOGPROBS_ROWS, self.pool.size))
        if pending <= left:
            return pending
        end = (sequence.computed + left) // self.pool.size * self.pool.size
        return max(0, end - sequence.computed)

    def _admit(self, sequence: Sequence, left: int, plan: Plan) -> int:
        """Tokens of a waiting sequence that this step computes, with blocks for them; 0 and nothing has changed."""
        found = [] if sequence.blocks else self._find(sequence)
        if found:
            self.pool.hold([block for block, _ in found])
            sequence.blocks = [block for block, _ in found]
            sequence.digests = [digest for _, digest in found]
            sequence.computed = sequence.cached = len(found) * self.pool.size
        count = self._count(sequence, left)
        spare = self.pool.count // 100 if self.running else 0
        room = self.pool.needed(sequence.computed + count) - len(sequence.blocks) + spare <= self.pool.free
        if count and room and self._reserve(sequence, count, plan):
            return count
        if found:
            self._give_back(sequence)
            sequence.cached = 0
        if not self.running and count:
            # Nobody runs who could give blocks back: those of samples that wait are all there is.
            self._make_room()
        return 0

    def _find(self, sequence: Sequence) -> list[tuple[int, bytes]]:
        """Blocks with the beginning of its text. One token at least is left to compute: the next follows from it."""
        found: list[tuple[int, bytes]] = []
        if not self.pool.share or sequence.request.params.prompt_logprobs is not None:
            return found
        digest = b""
        for number in range((len(sequence.tokens) - 1) // self.pool.size):
            digest = self._digest(sequence, number, digest)
            block = self.pool.find(digest)
            if block is None:
                break
            found.append((block, digest))
        return found

    def _reserve(self, sequence: Sequence, count: int, plan: Plan) -> bool:
        """Blocks of its own for the next tokens of a sequence."""
        size, held = self.pool.size, len(sequence.blocks)
        first = sequence.computed // size
        copy = first < held and self.pool.is_shared(sequence.blocks[first])
        needed = -(-(sequence.computed + count) // size) - held
        if needed <= 0 and not copy:
            return True
        blocks = self.pool.allocate(max(0, needed) + copy)
        if blocks is None:
            return False
        if copy:
            own, shared = blocks.pop(), sequence.blocks[first]
            plan.copies.append((shared, own))
            sequence.blocks[first] = own
            self.pool.release([shared])
        sequence.blocks += blocks
        if blocks and (sequence.computed + count) % size:  # the others are filled in the same step
            plan.fresh.append(blocks[-1])
        return True

    def _make_room(self) -> None:
        """Take the blocks of the last sample that waits with some, else those of the youngest that runs."""
        for sequence in reversed(self.waiting):
            if sequence.blocks:
                self._give_back(sequence)
                return
        sequence = self.running.pop()
        sequence.status = Status.WAITING
        self.preemptions += 1
        self._give_back(sequence)
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.digests, sequence.computed = [], [], 0


def guess(tokens: list[int], most: int, longest: int = 3, back: int = 2048) -> tuple[int, ...]:
    """What followed when the last tokens came before ("prompt lookup"): up to ``most`` tokens, or none."""
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        end = tokens[-size:]
        for start in range(len(tokens) - size - 1, max(-1, len(tokens) - back), -1):
            if tokens[start : start + size] == end:
                return tuple(tokens[start + size : start + size + most])
    return ()
