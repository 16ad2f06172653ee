"""The block pool as a state machine beside a slow account of who holds what."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from megatron_ds.inference.block_pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Holders are lists of blocks; a block is free if it stands in none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7, 4)
        self.held: list[list[int]] = []
        self.known: dict[bytes, int] = {}

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        free = 7 - len({block for blocks in self.held for block in blocks})
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert len(set(blocks)) == count and not {b for held in self.held for b in held} & set(blocks)
            self.held.append(blocks)
            self.known = {digest: block for digest, block in self.known.items() if block not in blocks}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        self.pool.hold(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), tokens=st.integers(0, 5))
    def publish(self, data: st.DataObject, tokens: int) -> None:
        block = data.draw(st.sampled_from(sorted({b for blocks in self.held for b in blocks})))
        digest = self.pool.hash_of(b"", [tokens] * 4)
        if digest not in self.known:
            self.known = {d: b for d, b in self.known.items() if b != block}
            self.known[digest] = block
        self.pool.publish(block, digest)

    @rule(tokens=st.integers(0, 5))
    def find(self, tokens: int) -> None:
        block = self.pool.find(self.pool.hash_of(b"", [tokens] * 4))
        assert block == self.known.get(self.pool.hash_of(b"", [tokens] * 4))
        if block is not None:
            self.pool.hold([block])  # free or not, it is taken with what is in it
            self.held.append([block])

    @invariant()
    def nothing_is_lost(self) -> None:
        holders = [block for blocks in self.held for block in blocks]
        assert self.pool.free == 7 - len(set(holders))
        for block in range(7):
            assert self.pool.is_shared(block) == (holders.count(block) > 1)
            assert [place for place in range(12) if self.pool.has_room([block] * 3, place)] == (
                [1, 2, 3, 5, 6, 7, 9, 10, 11] if holders.count(block) == 1 else []
            )


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_block_given_back_twice_is_a_defect() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(blocks)


def test_a_digest_is_of_all_that_stands_before() -> None:
    """Keys and values of the same tokens behind other ones are others."""
    pool = BlockPool(1, 4)
    begins = [pool.hash_of(b"", tokens) for tokens in ([1, 2, 3, 4], [1, 2, 3, 5], [4, 3, 2, 1])]
    assert len({b"", *begins, *(pool.hash_of(before, [1, 2, 3, 4]) for before in begins)}) == 7
    assert pool.hash_of(begins[0], [5, 6, 7, 8]) == pool.hash_of(pool.hash_of(b"", (1, 2, 3, 4)), (5, 6, 7, 8))


def test_what_is_worth_least_is_used_again_first() -> None:
    """Of what nobody holds: blocks without anything known, then the text released first, its end before its begin."""
    pool = BlockPool(6, 4)
    one, other = pool.allocate(3), pool.allocate(2)
    assert one is not None and other is not None
    for number, block in enumerate([*one[:2], *other]):
        pool.publish(block, bytes([number]))
    pool.release(other)
    pool.release(one)
    taken = [block for _ in range(6) for block in pool.allocate(1) or []]
    assert set(taken[:2]) == {5, one[2]}, "the block that was never used, and the one that was not full"
    assert taken[2:] == [other[1], other[0], one[1], one[0]]
    assert all(pool.find(bytes([number])) is None for number in range(4))


def test_a_pool_that_is_not_to_share_knows_no_block() -> None:
    pool = BlockPool(1, 4, share=False)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks[0], b"1")
    assert pool.find(b"1") is None
