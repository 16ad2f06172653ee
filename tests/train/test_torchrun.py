"""A job under a launcher: ours ends as its ranks do, passes signals on to them, and says why it failed in a line."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from started_ranks import ROOT, arguments, steps_done

from megatron_ds.train import torchrun
from megatron_ds.train.launch import clear_launch_environment
from megatron_ds.train.signals import LAUNCHER
from megatron_ds.train.torchrun import children, conclude

pytestmark = pytest.mark.alone


def _torchrun(ranks: int, *own: str, module: str = "torch.distributed.run") -> list[str]:
    launcher = ["-m", module, "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher, str(ROOT / "examples" / "pretrain_gpt.py"), *own]


def _rank_of(process: int) -> int:
    environment = Path(f"/proc/{process}/environ").read_text().split("\0")
    return int(next(value.removeprefix("RANK=") for value in environment if value.startswith("RANK=")))


OURS, TORCHS = "megatron_ds.train.torchrun", "torch.distributed.run"


@dataclass
class Launched:
    """A job of two ranks under a launcher, in its third step at least."""

    launcher: subprocess.Popen[bytes]
    ranks: list[int]  # process ids, by rank
    log: Path
    output: Path

    def ended(self, seconds: float = 60.0) -> tuple[int, str]:
        """The launcher's exit code and what was printed; no rank is left then."""
        code = self.launcher.wait(seconds)
        assert not any(Path(f"/proc/{rank}").exists() for rank in self.ranks)
        return code, self.log.read_text()


@contextlib.contextmanager
def launched(folder: Path, module: str, *more: str) -> Iterator[Launched]:
    run, path = folder / "run", folder / "log"
    command = _torchrun(2, *arguments(run, "--train.steps", "100000", *more), module=module)
    with path.open("w") as log:
        launcher = subprocess.Popen(
            command, stdout=log, stderr=log, env=clear_launch_environment(), start_new_session=True
        )
    ranks: list[int] = []
    try:
        until = time.monotonic() + 120
        while steps_done(run) < 3:
            assert launcher.poll() is None and time.monotonic() < until, path.read_text()
            time.sleep(0.05)
        ranks = sorted(children(launcher.pid), key=_rank_of)
        assert len(ranks) == 2
        yield Launched(launcher, ranks, path, run)
    finally:
        for process in (launcher.pid, *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launcher.wait()


def complete(job: Launched) -> set[str]:
    """The names of its checkpoints, without one that is being written."""
    return {path.name for path in (job.output / "checkpoints").glob("step-*[0-9]")}


in_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds torchrun's ranks in /proc")


@in_proc
@pytest.mark.parametrize(
    ("number", "to"),
    [(signal.SIGTERM, os.kill), (signal.SIGINT, os.kill), (signal.SIGINT, os.killpg)],
    ids=["SIGTERM to the launcher", "SIGINT to the launcher", "Ctrl-C in a terminal"],
)
def test_a_signal_to_the_launcher_saves_and_ends_well(
    tmp_path: Path, number: signal.Signals, to: Callable[[int, int], None]
) -> None:
    with launched(tmp_path, OURS) as job:
        to(job.launcher.pid, number)
        code, text = job.ended()
        assert code == 0, text
        assert "asked to stop: saved step" in text and "Traceback" not in text and "interrupted" not in text
        latest = (job.output / "checkpoints" / "latest").read_text().split()[0]
        assert latest == f"step-{steps_done(job.output):08d}"


@in_proc
def test_a_second_ctrl_c_ends_a_rank_too_that_no_longer_listens(tmp_path: Path) -> None:
    with launched(tmp_path, OURS, "--checkpoint.save-every", "2") as job:
        os.kill(job.ranks[1], signal.SIGSTOP)  # so that the step never ends
        before = complete(job)
        start = time.monotonic()
        os.killpg(job.launcher.pid, signal.SIGINT)
        time.sleep(1.5)
        assert job.launcher.poll() is None
        os.killpg(job.launcher.pid, signal.SIGINT)
        code, text = job.ended()
        assert time.monotonic() - start < 25  # torchrun gives it 30 s
        assert code == 130 and text.endswith("interrupted at once; what was saved before is as it was\n"), text
        assert "Traceback" not in text
        assert before and before <= complete(job)


@in_proc
def test_a_rank_killed_under_the_launcher_is_named_last_and_the_account_of_the_others_before(tmp_path: Path) -> None:
    with launched(tmp_path, OURS) as job:
        start = time.monotonic()
        os.kill(job.ranks[1], signal.SIGKILL)
        code, text = job.ended()
        assert code == 1 and time.monotonic() - start < 60
        assert "rank 1 was killed by SIGKILL" in text.splitlines()[-1] and "Traceback" not in text
        # The launcher ends the others at once: whether one of them still gives its account is not ours to say.
        assert text.find("no answer from rank 1: killed") < text.find("the job failed: ")


@in_proc
@pytest.mark.parametrize("module", [OURS, TORCHS])
def test_the_ranks_of_a_launcher_that_was_killed_save_and_end(tmp_path: Path, module: str) -> None:
    with launched(tmp_path, module, "--mesh.tp", "2") as job:
        job.launcher.kill()
        job.launcher.wait()
        until = time.monotonic() + 60
        while any(runs(rank) for rank in job.ranks):
            assert time.monotonic() < until, job.log.read_text()
            time.sleep(0.05)
        text = job.log.read_text()
        assert f"asked to stop: saved step {steps_done(job.output)}" in text
        assert module == TORCHS or "frame #" not in text, "the launcher's store went with it: that is no news"


def runs(process: int) -> bool:
    """Not gone and not only waiting for its new parent to take note of its end."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@in_proc
def test_a_rank_that_finds_its_launcher_gone_ends_before_it_starts(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = {**clear_launch_environment(), "TORCHELASTIC_RUN_ID": "one", LAUNCHER: str(gone.pid)}
    command = [sys.executable, str(ROOT / "examples" / "pretrain_gpt.py"), *arguments(tmp_path / "run")]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGTERM
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("to", [os.kill, os.killpg], ids=["SIGTERM", "Ctrl-C"])
def test_who_runs_a_job_waits_for_it_after_a_signal(tmp_path: Path, to: Callable[[int, int], None]) -> None:
    job = (
        "import signal, sys, time; asked = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda *_: asked.append(1))\n"
        f"open({str(tmp_path / 'started')!r}, 'w').close()\n"
        "while not asked: time.sleep(0.01)\n"
        f"time.sleep(1); open({str(tmp_path / 'saved')!r}, 'w').close()"
    )
    code = "import sys; from megatron_ds.train.torchrun import run_job; sys.exit(run_job(sys.argv[1:]))"
    runner = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", job],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert runner.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    number = signal.SIGTERM if to is os.kill else signal.SIGINT
    to(runner.pid, number)
    assert runner.communicate(timeout=30)[1] == ""
    assert runner.returncode == 128 + number and (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("codes", "twice", "code", "line"),
    [
        ({0: 2, 1: 2}, False, 2, ""),
        ({0: -15, 1: 2}, False, 2, ""),
        ({0: 2, 1: 1}, False, 2, ""),
        ({0: 130, 1: -2}, False, 130, "interrupted before training started"),
        ({0: -15, 1: -15}, False, 143, "stopped by a signal before training started"),
        ({0: -9, 1: 130}, True, 130, "\ninterrupted at once; what was saved before is as it was"),
        (
            {0: 1, 1: -15, 2: -9},
            False,
            1,
            "the job failed: rank 0 ended with exit code 1, rank 2 was killed by SIGKILL; see the first error above",
        ),
    ],
)
def test_the_last_word_of_the_launcher(codes: dict[int, int], twice: bool, code: int, line: str) -> None:
    assert conclude(codes, twice) == (code, line)


@pytest.mark.parametrize("module", [OURS, TORCHS])
def test_an_error_of_the_command_line_is_said_once_under_torchrun(tmp_path: Path, module: str) -> None:
    done = subprocess.run(
        _torchrun(2, *arguments(tmp_path / "run", "--model.num-layrs", "3"), module=module),
        capture_output=True,
        text=True,
        env={**clear_launch_environment(), "OMP_NUM_THREADS": "1"},  # torchrun warns where it is not set
        timeout=120,
    )
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "unknown option --model.num-layrs; did you mean '--model.num-layers'?" in done.stderr
    assert done.returncode == (2 if module == OURS else 1)
    assert module == TORCHS or len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("ended_well", "exits"), [(True, []), (False, [143])])
def test_a_signal_that_comes_when_the_ranks_have_saved_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, ended_well: bool, exits: list[int]
) -> None:
    """The other node got it earlier, and told them."""
    found: list[int] = []
    monkeypatch.setattr(torchrun, "children", lambda parent: [])
    monkeypatch.setattr(torchrun, "_NOTICES_WITHIN", 0.05)
    monkeypatch.setattr(os, "_exit", found.append)
    receiver, sender = socket.socketpair()
    done = threading.Event()
    if ended_well:
        done.set()
    with receiver, sender:
        sender.send(bytes([signal.SIGTERM]))
        sender.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ProcessLookupError):
            torchrun._pass_on(receiver, threading.Event(), done)
    assert found == exits


def test_slurms_sigusr1_is_passed_on_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[list[int], int]] = []
    monkeypatch.setattr(torchrun, "children", lambda parent: [7, 8])
    monkeypatch.setattr(torchrun, "_send", lambda ranks, number: found.append((ranks, number)))
    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.send(bytes([signal.SIGUSR1]))
        sender.shutdown(socket.SHUT_RDWR)
        torchrun._pass_on(receiver, threading.Event(), threading.Event())
    assert found == [([7, 8], signal.SIGUSR1)]


def test_a_node_that_joins_an_elastic_job_later_finds_the_store_of_its_round() -> None:
    """With the shared one the agents wait for each other; run as two nodes of which the second came late."""
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    assert torchrun.rendezvous_environment(["--nnodes", "2:4", "--rdzv_backend=c10d", "x.py"]) == own
    assert torchrun.rendezvous_environment(["--nnodes", "2", "--rdzv-backend", "c10d", "x.py"]) == own
    assert torchrun.rendezvous_environment(["--nnodes", "2", "--node-rank", "0", "x.py"]) == {}
