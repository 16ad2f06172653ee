"""``megatron-ds serve`` as a process: what it says, how it ends, and its mistakes in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from hf_models import _llama

from megatron_ds.data.tokenizers import ByteTokenizer
from megatron_ds.errors import ConfigError
from megatron_ds.inference import LLM, follower, ranks, served_model
from megatron_ds.inference.command import main
from megatron_ds.inference.ranks import Ranks
from megatron_ds.inference.serving_options import EngineOptions
from megatron_ds.train.torchrun import children

COMMAND = [sys.executable, "-m", "megatron_ds.inference.command"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-llama")
    _llama(vocab_size=257, max_position_embeddings=4096, bos_token_id=None, eos_token_id=256).save_pretrained(path)
    ByteTokenizer().save_hf(path)
    return path


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the program without the seconds that a process takes to start: its exit status, and what it says."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["megatron-ds", *arguments])
        return main(), "".join(capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)


def test_what_is_under_way_is_answered_before_it_ends(folder: Path) -> None:
    """With two ranks, both of which the signal reaches, as from a service manager."""
    command = [*COMMAND, "serve", str(folder), "--port", "0", "--tensor-parallel-size", "2", "--max-num-seqs", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert server.stdout is not None
    said, answers = [], []
    try:
        for line in server.stdout:
            said.append(line)
            if "http://" in line:
                break
        assert re.fullmatch(r"tiny-llama\d+: texts of up to 4096 tokens, .* at http://127.0.0.1:\d+/v1\n", said[-1])
        address = said[-1].split()[-1]
        body = json.dumps({"prompt": "abc", "max_tokens": 150, "ignore_eos": True, "stream": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{address}/completions", body), timeout=240) as answer:
            answers.append(answer.readline().decode())
            for process in (*children(server.pid), server.pid):
                os.kill(process, signal.SIGTERM)
            answers += [line.decode() for line in answer]
        assert '"finish_reason": "length"' in "".join(answers) and answers[-2] == "data: [DONE]\n"
        rest = server.communicate(timeout=240)[0]
        assert server.returncode == 0 and not rest, rest
    finally:
        server.kill()


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, here: Run) -> None:
    """One as a process."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [*COMMAND, "serve", str(folder), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        cases = [
            (
                (done.returncode, done.stdout + done.stderr),
                rf"cannot listen at 127.0.0.1:{port}: .*; choose another with",
            ),
            (here("serve", str(folder), "--port", "99999999"), "cannot listen at"),
            (here("serve", str(tmp_path), "--port", "0"), "no checkpoint"),
            (here("serve", str(folder), "--max-requests", "0"), "max_requests=0: Input should be greater"),
            (here("serve", str(folder), "--request-timeout", "0"), "request_timeout=0.0: Input should be greater"),
            (here("serve", "a" * 300, "--port", "0"), "File name too long"),  # an OSError, as of others' folders
        ]
    for (code, said), what in cases:
        assert code == 2 and re.match(f"error: .*{what}", said) and said.count("\n") == 1, said


def test_a_server_without_one_of_its_ranks_ends(folder: Path, here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "require_ranks", Mock(side_effect=ConfigError("rank 1 is gone")))
    code, said = here("serve", str(folder), "--port", "0")
    assert code == 2 and re.fullmatch(".* at http://127.0.0.1:.*\nerror: rank 1 is gone\n", said)


def test_a_signal_ends_a_server_that_is_loading(folder: Path, here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an exception, after which no other rank is left."""
    monkeypatch.setattr(served_model, "build", lambda *_: signal.raise_signal(signal.SIGTERM))
    abort = Mock()
    monkeypatch.setattr(Ranks, "abort", abort)
    assert here("serve", str(folder), "--port", "0") == (0, "")
    abort.assert_called_once_with()


def test_help_teaches(here: Run) -> None:
    code, said = here("serve", "--help")
    assert code == 0 and "megatron-ds serve runs/mine/hf --port 8000" in said and "--tensor-parallel-size" in said
    assert here("--help") == (0, "usage: megatron-ds serve FOLDER ...   (megatron-ds serve --help says what else)\n")
    assert here("train")[0] == 2


def launched(monkeypatch: pytest.MonkeyPatch, world: str, rank: str, **more: str) -> None:
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **more}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("world", "rank", "agents", "serves"),
    [("2", "0", "True", False), ("2", "0", None, True), ("2", "1", None, False), ("1", "0", "True", True)],
)
def test_the_first_rank_serves_the_store_where_no_torchrun_does(
    monkeypatch: pytest.MonkeyPatch, world: str, rank: str, agents: str | None, serves: bool
) -> None:
    """As where each rank is started by hand on its node: all of them waited ten minutes for a server."""
    launched(monkeypatch, world, rank, **({"TORCHELASTIC_USE_AGENT_STORE": agents} if agents else {}))

    def store(address: str, port: int, world: int, is_master: bool, *rest: object, **more: object) -> None:
        raise RuntimeError(f"is_master={is_master}")

    monkeypatch.setattr(dist, "TCPStore", store)
    with pytest.raises(ConfigError, match=f"has not met the other ranks of the served model: is_master={serves}"):
        Ranks(EngineOptions("model", tensor_parallel_size=2, device="cpu"))


def test_ranks_that_torchrun_starts_anew_do_not_find_the_old_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose addresses its store still had."""
    launched(monkeypatch, "2", "1", TORCHELASTIC_RESTART_COUNT="3")
    store = dist.HashStore()
    monkeypatch.setattr(dist, "TCPStore", lambda *_, **__: store)
    monkeypatch.setattr(ranks, "init_process_group", Mock(side_effect=RuntimeError("this far")))
    with pytest.raises(ConfigError, match="this far"):
        Ranks(EngineOptions("model", tensor_parallel_size=2, device="cpu"))
    assert store.check(["attempt 3/megatron-ds/rank-1"])


def test_more_ranks_than_the_model_is_split_over_are_refused(
    folder: Path, here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one would have listened where the first one does."""
    launched(monkeypatch, "2", "1")
    monkeypatch.setattr(follower, "_leave_signals_to_the_first", lambda: None)
    code, said = here("serve", str(folder))
    assert code == 2 and re.match("error: tensor_parallel_size x .* = 1, but more ranks were started; start one", said)
