"""Blocks of the key/value cache: who holds them, and which hold the same beginning of a text.

A block holds the keys and values of ``size`` consecutive tokens, in all layers. A full one is known by a hash of its
tokens and of all before them, so that a later text with the same beginning takes it instead of computing it again
(vLLM's automatic prefix caching). A block that nobody holds keeps what is in it until its memory is needed, the one
that was given back first before the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from megatron_ds.errors import ConfigError


class BlockPool:
    """``count`` blocks of ``size`` tokens.

    Args:
        share: whether blocks with the same beginning of a text are shared.
    """

    def __init__(self, count: int, size: int, share: bool = True):
        if count < 1 or size < 1:
            raise ConfigError(f"a cache of {count} blocks of {size} tokens holds nothing; give it more memory")
        self.count, self.size, self.share = count, size, share
        self._holders = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._known: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-tokens // self.size)

    def allocate(self, count: int) -> list[int] | None:
        """So many blocks, each with one holder; None, and nothing has changed, where there are not as many."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
            self._forget(block)
        return blocks

    def hold(self, blocks: Sequence[int]) -> None:
        """One holder more of each."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less of each. The last ones of a text are used again first: its beginning is worth more."""
        for block in reversed(blocks):
            if self._holders[block] < 1:
                raise RuntimeError(f"block {block} is given back more often than it was taken")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._hashes:
                    self._free.move_to_end(block, last=False)

    def is_shared(self, block: int) -> bool:
        return self._holders[block] > 1

    def has_room(self, blocks: Sequence[int], place: int) -> bool:
        """Whether the token at a ``place`` of a text goes to one of its ``blocks`` that is filled in part and shared
        with nobody."""
        return bool(place % self.size) and self._holders[blocks[place // self.size]] == 1

    def hash_of(self, before: bytes, tokens: Sequence[int]) -> bytes:
        """Of a full block's tokens, ``before`` being that of the block before it (empty for the first)."""
        return blake2b(before + np.asarray(tokens, np.int64).tobytes(), digest_size=16).digest()

    def publish(self, block: int, digest: bytes) -> None:
        """The block is full and computed: from now on others may take it."""
        if self.share and digest not in self._known:
            self._forget(block)
            self._known[digest], self._hashes[block] = block, digest

    def find(self, digest: bytes) -> int | None:
        return self._known.get(digest)

    def reset(self) -> None:
        """Forget what is in blocks, for example because the weights have changed."""
        self._known.clear()
        self._hashes.clear()

    def _forget(self, block: int) -> None:
        digest = self._hashes.pop(block, None)
        if digest is not None:
            del self._known[digest]
