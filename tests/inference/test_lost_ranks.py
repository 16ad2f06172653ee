"""A served model of which one rank is gone: killed, or stopped as where its machine or its link is. Nobody waits."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from hf_models import _llama

from megatron_ds.errors import ConfigError
from megatron_ds.inference import LLM, SamplingParams, follower, ranks
from megatron_ds.inference.serving_options import EngineOptions
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.testing import RankFailed, run_ranks

TIMEOUT = 1.0
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-llama")
    _llama().save_pretrained(path)
    return path


def loses_a_rank(folder: Path, lost: int, number: int) -> str:
    """On both ranks, as where each has been started on a host of its own. What one says of the other's silence."""
    rank = dist.get_rank()
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) if rank == 0 else None
    told = torch.tensor([store.port if store is not None else 0, 0, 0])
    told[1 + rank] = os.getpid()
    dist.all_reduce(told)
    dist.destroy_process_group()
    port, *pids = told.tolist()
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    with pytest.raises(ConfigError) as error, LLM(folder, pipeline_parallel_size=2, rank_timeout=TIMEOUT) as llm:
        if rank > 0:
            llm.follow()
        if lost == 1:  # it answers after a pause that is longer than the timeout
            time.sleep(1.2 * TIMEOUT)
        llm.generate([[5, 6]], GREEDY, use_tqdm=False)
        os.kill(pids[lost], number)
        while True:
            llm.require_ranks()
            time.sleep(0.05)
    if number == signal.SIGKILL:
        raise error.value
    with contextlib.suppress(ProcessLookupError):  # it was the first to wake the other one
        os.kill(pids[1 - rank], signal.SIGCONT)  # so that it can see that it is alone
    return str(error.value)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_does_not_answer_is_missed_though_nobody_asks(folder: Path, lost: int) -> None:
    for rank, said in enumerate(run_ranks(loses_a_rank, 2, folder, lost, signal.SIGSTOP, timeout=60)):
        assert re.match(f"rank {rank} of the served model cannot go on with the others: ", said)
        assert rank == lost or "imed out" in said


def test_a_rank_whose_first_one_is_killed_ends(folder: Path) -> None:
    what = r"rank 0 of 2 failed first:\ndied without a traceback, exit code -9\n\(ranks \[1\] failed after it"
    with pytest.raises(RankFailed, match=what):
        run_ranks(loses_a_rank, 2, folder, 0, signal.SIGKILL, timeout=60)


def test_ranks_with_different_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where each was started by hand on its host; they would cut their batches differently."""
    monkeypatch.setattr(ranks, "exchange", lambda _, text: [text, text.replace('"block_size": 32', '"block_size": 8')])
    with pytest.raises(ConfigError, match="rank 1 was started with block_size=8 and the first rank with 32"):
        ranks.Ranks(EngineOptions("model", device="cpu"))


def test_a_defect_is_not_taken_for_a_lost_rank() -> None:
    own = ranks.Ranks(EngineOptions("model", device="cpu"))
    own.mesh = Mesh.described(MeshShape(tp=2), 0)
    with pytest.raises(RuntimeError, match="The size of tensor a"), own.exchange():
        torch.ones(2) + torch.ones(3)


def test_a_rank_ends_after_the_process_that_has_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may have ended before this rank could ask for it."""
    ended = Mock()
    monkeypatch.setattr(os, "_exit", ended)
    follower._end_after(first=-1, last_words=0.0)
    ended.assert_called_once_with(1)
