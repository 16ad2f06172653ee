"""Starting and ending a job with real processes: who failed is named, the others end soon, signals save."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import planted_faults
import pytest
import torch.distributed as dist
from started_ranks import Ranks, arguments, free_port, started, steps_done

from megatron_ds.errors import ConfigError
from megatron_ds.train.bounded import BoundedStore
from megatron_ds.train.failure import Watch
from megatron_ds.train.launch import RankInfo, clear_launch_environment
from megatron_ds.train.signals import stop_signals

pytestmark = pytest.mark.alone

FOUR = [["--mesh.tp", "2", "--mesh.pp", "2"], ["--mesh.dp", "4"]]


# --- a rank fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", FOUR, ids=["tp-pp", "dp"])
def test_the_traceback_of_the_rank_that_failed_is_the_only_one(tmp_path: Path, mesh: list[str]) -> None:
    with started(tmp_path, [arguments(tmp_path / "run", *mesh)] * 4, planted_faults.raises) as ranks:
        assert ranks.wait() == [1, 1, 1, 1]
        text = ranks.everything()
        assert text.count("Traceback") == 1, text
        said = ranks.output(1)
        assert said.startswith("rank 1 failed:\nTraceback") and said.rstrip().endswith("ValueError: a planted fault")
        # One line a node, from its first rank.
        assert "rank 0 stops: rank 1: ValueError: a planted fault" in ranks.output(0)
        assert ranks.output(2) == ranks.output(3) == ""


@pytest.mark.parametrize("mesh", FOUR, ids=["tp-pp", "dp"])
def test_a_killed_rank_is_named_with_the_places_of_the_others(tmp_path: Path, mesh: list[str]) -> None:
    with started(tmp_path, [arguments(tmp_path / "run", *mesh)] * 4, planted_faults.is_killed) as ranks:
        assert ranks.wait() == [1, -signal.SIGKILL, 1, 1]
        text = ranks.everything()
        assert text.count("lost its connection to another rank") == 1
        assert "no answer from rank 1: killed" in text
        for rank in (0, 2, 3):
            assert text.count(f"  rank {rank}: step 2") == 1
        assert "Traceback" not in text, text


def test_the_death_of_rank_0_takes_its_store_along_and_ends_the_job(tmp_path: Path) -> None:
    both = [arguments(tmp_path / "run", "--mesh.tp", "2")] * 2
    with started(tmp_path, both, planted_faults.rank_0_is_killed) as ranks:
        assert ranks.wait() == [-signal.SIGKILL, 1]
        assert "rank 1 stops: rank 0: gone without a word" in ranks.output(1)


@pytest.mark.parametrize("fault", [planted_faults.hangs, planted_faults.is_stopped], ids=["hangs", "stopped"])
def test_a_rank_that_hangs_is_named_with_the_line_it_stands_in(tmp_path: Path, fault: object) -> None:
    one = arguments(tmp_path / "run", "--mesh.tp", "2", "--timeout", "4")
    assert callable(fault)
    with started(tmp_path, [one] * 2, fault) as ranks:
        if fault is planted_faults.hangs:
            assert ranks.wait() == [1, 1]
            assert "rank 1 did not wait for any other and so held them up" in ranks.output(0)
            assert "rank 1: step 2: train/planted_faults.py" in ranks.output(0)
            assert "sleep_for_ever" in ranks.output(0)
            assert "timed out after 4 s: rank 1 of the tp axis has not come" in ranks.output(0)  # torch: 1800
            assert "0F0, forward of micro-batch 0 on stage 0" in ranks.output(0)
        else:
            ranks.processes[0].join(60)
            assert ranks.processes[0].exitcode == 1
            assert "no answer from rank 1: killed" in ranks.output(0)
        assert "waited 4 s in vain for another rank" in ranks.output(0)


def ends(ranks: Ranks, rank: int) -> tuple[int | None, str]:
    """Exit code and words of a rank that ends while another stays; None if it does not in two minutes."""
    ranks.processes[rank].join(120)
    return ranks.processes[rank].exitcode, ranks.output(rank)


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (
            planted_faults.rank_0_is_stopped,
            1,
            "rank 1 stops: rank 0: no word from it or its torchrun; stopped, or its machine cannot be reached (timed "
            "out: the job's store at localhost:",
        ),
        (planted_faults.rank_0_is_stopped_while_groups_are_made, 1, "rank 1 stops: rank 0: no word from it or its"),
        (
            planted_faults.rank_0_is_stopped_in_its_checks,
            2,
            "error: rank 0, or its torchrun, does not answer any more while the ranks were starting",
        ),
    ],
    ids=["training", "making groups", "checking"],
)
def test_a_rank_ends_in_time_although_the_store_and_its_holder_are_frozen(
    tmp_path: Path, fault: Callable[[int], None], code: int, words: str
) -> None:
    one = arguments(tmp_path / "run", "--mesh.tp", "2", "--timeout", "4")
    with started(tmp_path, [one] * 2, fault) as ranks:
        found, said = ends(ranks, 1)
        assert (found, ranks.processes[0].exitcode) == (code, None) and words in said, said
        assert "Traceback" not in said


def test_a_port_where_somebody_listens_and_says_nothing(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("localhost", 0))
        silent.listen(8)
        own = {**_environment(1, 2), "MASTER_PORT": str(silent.getsockname()[1])}
        alone = [arguments(tmp_path / "run", "--timeout", "3")]
        with started(tmp_path, alone, planted_faults.speaks_at_once, [own]) as ranks:
            assert ranks.wait() == [2]
            assert "rank 1 of 2: what listens at MASTER_ADDR:MASTER_PORT=localhost:" in ranks.output(0)
            assert "has not answered in 3 s" in ranks.output(0)


def test_a_rank_that_hangs_is_named_by_those_who_wait_for_its_tokens(tmp_path: Path) -> None:
    """Data-parallel ranks of one host read each other's memory, and wait for tokens instead of collectives."""
    one = arguments(tmp_path / "run", "--timeout", "4")
    with started(tmp_path, [one] * 4, planted_faults.hangs_at_the_end) as ranks:
        assert ranks.wait() == [1, 1, 1, 1]
        text = ranks.everything()
        assert "rank 1 of the data axis has not come" in text
        assert "waited 4 s in vain for another rank" in text
        assert "rank 1 did not wait for any other and so held them up" in text, "but the others did"
        assert "sleep_for_ever" in text


def test_a_wait_that_no_backend_ends_is_ended_by_the_watch(tmp_path: Path) -> None:
    """As under NCCL, whose waits the host cannot leave: the watching thread speaks, and ends the process."""
    store = dist.FileStore(str(tmp_path / "store"), 2)
    said, ended = [], threading.Event()

    class Observed(Watch):
        def _end(self, first: object) -> None:
            said.append((first, self._place))
            ended.set()
            self.stop()

    watch = Observed(BoundedStore(store, 1.0), 0, 2, timeout=0.1, interval=0.02, grace=0.1)
    watch.describe = lambda: "step 7"
    watch.start()
    with pytest.raises(RuntimeError, match="timeout"):
        dist.HashStore().wait(["never set"], timedelta(seconds=3))  # in C, as a collective
    assert ended.is_set()
    first, place = said[0]
    assert first is None and place.waits
    assert place.text.startswith("step 7: ") and "test_launch.py" in place.text


def test_work_without_a_wait_is_never_ended_however_long() -> None:
    class Observed(Watch):
        def _end(self, first: object) -> None:
            raise AssertionError("ended")

    watch = Observed(BoundedStore(dist.HashStore(), 1.0), 0, 2, timeout=0.05, interval=0.01, grace=0.05)
    watch.start()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        pass
    assert watch._thread.is_alive()
    watch.stop()


# --- the checks before training ---------------------------------------------------------------------------------


def test_ranks_with_different_configurations_end_before_the_first_collective(tmp_path: Path) -> None:
    one, other = arguments(tmp_path / "run"), arguments(tmp_path / "run", "--optimizer.lr", "0.5")
    with started(tmp_path, [one, one, other]) as ranks:
        assert ranks.wait() == [2, 2, 2]
        text = ranks.everything()
        assert text.count("error: rank 2: another configuration than on rank 0 (optimizer.lr: 0.5 against ") == 1
        assert not (tmp_path / "run").exists()


def test_a_rank_of_another_world_ends_all(tmp_path: Path) -> None:
    one = arguments(tmp_path / "run", "--timeout", "20")
    with started(tmp_path, [one, one], environment=[{}, {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}]) as ranks:
        assert ranks.wait() == [2, 2]
        assert "error: rank 1 was started as one of WORLD_SIZE=4 ranks, rank 0 as one of 2" in ranks.everything()


def test_what_one_node_alone_lacks_is_said_and_ends_all(tmp_path: Path) -> None:
    """Rank 1's node does not have the tokenizer that the configuration names: a relative path from elsewhere."""
    own = arguments(tmp_path / "run", "--data.tokenizer", "bytes", "--model.vocab-size", "300")
    with started(tmp_path, [own, own], planted_faults.lacks_the_data) as ranks:
        assert ranks.wait() == [2, 2]
        assert ranks.everything().count("error: rank 1: no such dataset here") == 1


def test_a_rank_that_never_starts_is_missed(tmp_path: Path) -> None:
    one = arguments(tmp_path / "run", "--timeout", "3")
    with started(tmp_path, [one], environment=[_environment(0, 2)]) as ranks:
        assert ranks.wait() == [2]
        assert "rank 0 of 2 could not join the others at MASTER_ADDR:MASTER_PORT=localhost:" in ranks.output(0)
        assert "Are all 2 ranks started" in ranks.output(0)


def test_a_rank_that_finds_nobody_says_so_in_one_line(tmp_path: Path) -> None:
    one = arguments(tmp_path / "run", "--timeout", "1")
    with started(tmp_path, [one], planted_faults.speaks_at_once, [_environment(1, 2)]) as ranks:
        assert ranks.wait() == [2]
        (said,) = ranks.output(0).splitlines()
        assert "error: rank 1 of 2 could not join the others at MASTER_ADDR:MASTER_PORT=localhost:" in said
        assert "no connection in 1 s: [Errno 111] Connection refused. Are all 2 ranks started" in said


def _environment(rank: int, world: int) -> dict[str, str]:
    own = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    return {**own, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "lacks RANK; start with torchrun"),
        ({"MASTER_PORT": None}, "lacks MASTER_PORT; start with torchrun"),
        ({"RANK": "first"}, "must be numbers.*'first'"),
        ({"RANK": "2"}, "rank=2, world_size=2.*not one of the ranks"),
    ],
)
def test_half_an_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str
) -> None:
    for name, value in {**_environment(1, 2), **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        RankInfo.from_environment()


def test_a_whole_environment_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _environment(1, 2):
        monkeypatch.delenv(name, raising=False)
    assert RankInfo.from_environment() == RankInfo(0, 1, 0, 1)
    for name, value in _environment(1, 2).items():
        monkeypatch.setenv(name, value)
    assert RankInfo.from_environment() == RankInfo(1, 2, 1, 2)
    assert not set(_environment(1, 2)) & set(clear_launch_environment())


# --- signals ----------------------------------------------------------------------------------------------------


def _losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


TWELVE = ["--train.steps", "12", "--mesh.tp", "2", "--model.hidden-dropout", "0.1"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of twelve steps in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with started(folder, [arguments(folder / "run", *TWELVE)] * 2) as ranks:
        assert ranks.wait() == [0, 0]
    return _losses(folder / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_one_rank_saves_on_all_and_the_rest_gives_the_same_curve(
    tmp_path: Path, number: signal.Signals, uninterrupted: list[float]
) -> None:
    both = [arguments(tmp_path / "run", *TWELVE, "--checkpoint.resume")] * 2
    with started(tmp_path / "a", both, planted_faults.is_slow) as ranks:
        ranks.wait_for(lambda: steps_done(tmp_path / "run") >= 3)
        ranks.signal(1, number)
        assert ranks.wait() == [0, 0]
        assert "so this run starts from the beginning" in ranks.output(0)
        stopped = steps_done(tmp_path / "run")
        assert 3 <= stopped < 12 and f"asked to stop: saved step {stopped}" in ranks.output(0)
    with started(tmp_path / "b", both) as ranks:
        assert ranks.wait() == [0, 0]
        assert f"resumed from step {stopped} of 12" in ranks.output(0)
    assert _losses(tmp_path / "run") == uninterrupted


def test_a_sigterm_that_comes_when_all_is_saved_is_not_heard(tmp_path: Path) -> None:
    with started(tmp_path, [arguments(tmp_path / "run")] * 2, planted_faults.hears_of_the_end_late) as ranks:
        assert ranks.wait() == [0, 0]


def test_a_second_ctrl_c_interrupts_a_rank_that_waits_for_one_that_hangs(tmp_path: Path) -> None:
    both = [arguments(tmp_path / "run", "--mesh.tp", "2")] * 2
    with started(tmp_path, both, planted_faults.hangs) as ranks:
        ranks.wait_for(lambda: steps_done(tmp_path / "run") >= 1)
        time.sleep(0.5)
        ranks.signal(0, signal.SIGINT)
        time.sleep(1.5)
        assert ranks.processes[0].is_alive()  # asked to stop: it would, after the step
        ranks.signal(0, signal.SIGINT)
        ranks.processes[0].join(20)
        assert ranks.processes[0].exitcode == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_may_ask_as_often_as_it_likes(number: signal.Signals) -> None:
    asked = threading.Event()
    with stop_signals(asked):
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert asked.wait(5)


def test_two_sigints_at_once_are_one_ctrl_c_and_a_later_one_is_the_second() -> None:
    asked = threading.Event()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals(asked):
        assert not asked.is_set()
        for _ in range(2):  # from the terminal and from torchrun
            os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(5)
        time.sleep(1.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# --- memory of a CPU rank ---------------------------------------------------------------------------------------


_MAPS_THEN_KEEPS = """
import re
import torch
from pathlib import Path
from megatron_ds.kernels.cpu.allocator import keep_freed_memory, map_large_tensors

def resident():
    return int(re.findall(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024

def free_many():
    temporary = [torch.ones(1 << 20) for _ in range(50)]
    held.append(torch.ones(1 << 20))  # above them: what lies below cannot go back as the end of the heap

held = []
map_large_tensors()
start = resident()
free_many()
free_many()  # after a first block was freed glibc maps fewer, if left to itself
mapped = resident() - start
keep_freed_memory()
free_many()
kept = resident() - start
keep_freed_memory()
print(mapped, kept, resident() - start)
"""


def test_freed_memory_goes_back_until_it_is_to_be_kept() -> None:
    done = subprocess.run([sys.executable, "-c", _MAPS_THEN_KEEPS], capture_output=True, text=True, check=True)
    mapped, kept, given_back = map(float, done.stdout.split())
    assert mapped < 20  # MiB, of the 8 that are held
    assert kept > 200  # of 212
    assert given_back < 25  # of the 12 that are held
