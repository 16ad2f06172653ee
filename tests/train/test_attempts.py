"""Ranks that launchers start again, each node when it pleases, meet in one attempt; those of before have left it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch.distributed as dist

from megatron_ds.train.attempts import met
from megatron_ds.train.bounded import in_thread
from megatron_ds.train.failure import FAILED


class Launchers:
    """Ranks in threads, and the store that outlives them."""

    def __init__(self) -> None:
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(self, *ranks: int, world: int = 4, timeout: float = 10.0) -> list[Future[int]]:
        # A client each, as a client answers one call at a time.
        return [
            in_thread(lambda rank=rank: met(dist.TCPStore("127.0.0.1", self.server.port), rank, world, timeout))
            for rank in ranks
        ]


@pytest.fixture
def launchers() -> Iterator[Launchers]:
    yield Launchers()


def attempts(started: list[Future[int]]) -> set[int]:
    return {future.result(20) for future in started}


def test_every_start_of_all_ranks_is_another_attempt(launchers: Launchers) -> None:
    for attempt in range(3):
        assert attempts(launchers.start(0, 1, 2, 3)) == {attempt}


def test_a_node_whose_ranks_wait_follows_one_that_starts_again(
    launchers: Launchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = launchers.start(0, 1)
    (died,) = launchers.start(2, timeout=0.3)  # before its rank 3 began
    assert isinstance(died.exception(20), ConnectionError)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert attempts(waiting + launchers.start(2, 3)) == {1}


def test_ranks_still_in_an_attempt_are_told_that_it_is_over(launchers: Launchers) -> None:
    training = launchers.start(0, 1, 2, 3)
    assert attempts(training) == {0}
    again = launchers.start(2, 3)
    told = dist.TCPStore("127.0.0.1", launchers.server.port).get(f"0/{FAILED}")  # waits for it
    assert b"was started again by its launcher" in told
    assert attempts(launchers.start(0, 1) + again) == {1}


def test_launchers_may_count_differently(launchers: Launchers, monkeypatch: pytest.MonkeyPatch) -> None:
    first = launchers.start(0, 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert attempts(launchers.start(2, 3) + first) == {2}


def test_a_world_that_has_grown_meets_in_the_next_attempt(launchers: Launchers) -> None:
    assert attempts(launchers.start(0, 1, world=2)) == {0}
    assert attempts(launchers.start(2, 3, 1, 0)) == {1}


def test_ranks_that_do_not_come_are_counted(launchers: Launchers) -> None:
    (alone,) = launchers.start(0, timeout=0.3)
    with pytest.raises(ConnectionError, match=r"1 of 4 ranks have begun in 0 s"):
        alone.result(20)
