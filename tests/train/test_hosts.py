"""A job on two hosts of which one is lost: every process of the other ends by itself, its launcher too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import ADDRESSES, Hosts, hosts, launched, missing, wait_for_steps
from started_ranks import ROOT, arguments

from megatron_ds.train.launch import clear_launch_environment

pytestmark = pytest.mark.alone

LONG = ["--zero.stage", "3", "--timeout", "4", "--train.steps", "100000"]
NO_WORD = "rank 0: no word from it or its torchrun; stopped, or its machine cannot be reached"


@pytest.fixture
def two_hosts() -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(reason)
    with hosts() as made:
        yield made


def test_a_cut_link_ends_both_hosts(two_hosts: Hosts, tmp_path: Path) -> None:
    with launched(two_hosts, tmp_path, *LONG) as job:
        wait_for_steps(job, 3)
        two_hosts.link.loss = 1.0
        assert [job.wait(0), job.wait(1)] == [1, 1]
        # Beside the store the account is complete; beyond the link there is nobody to ask.
        assert "no answer from ranks 2, 3" in job.output(0) and "rank 1: step" in job.output(0)
        assert NO_WORD in job.output(1)
        assert "Traceback" not in job.output(0) + job.output(1)


def test_a_host_that_is_frozen_with_the_store_ends_the_other(two_hosts: Hosts, tmp_path: Path) -> None:
    with launched(two_hosts, tmp_path, *LONG) as job:
        wait_for_steps(job, 3)
        job.freeze(0)
        assert job.wait(1) == 1
        assert NO_WORD in job.output(1)
        assert job.launchers[0].poll() is None


def test_a_link_that_drops_half_its_packets_hangs_nobody(two_hosts: Hosts, tmp_path: Path) -> None:
    """TCP may get through with it or not: either all ranks finish, or all end."""
    with launched(two_hosts, tmp_path, "--timeout", "4", "--train.steps", "1000") as job:
        wait_for_steps(job, 3)
        two_hosts.link.loss = 0.5
        assert {job.wait(0), job.wait(1)} in ({0}, {1})


def test_an_address_that_nothing_answers_from_is_named_in_time(two_hosts: Hosts, tmp_path: Path) -> None:
    two_hosts.link.loss = 1.0
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500"}
    command = [sys.executable, str(ROOT / "examples" / "pretrain_gpt.py"), *arguments(tmp_path / "run")]
    done = subprocess.run(
        two_hosts.command(1, *command, "--timeout", "3"),
        env={**clear_launch_environment(), **place},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"MASTER_ADDR:MASTER_PORT={ADDRESSES[0]}:29500" in done.stderr
