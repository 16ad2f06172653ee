"""The same scripts on DeepSpeed itself and here: losses, rates, weights and checkpoints, to the rounding of fp32.

What DeepSpeed 0.19.8 does not run on a CPU is compared with plain torch alone: two backward passes in one update of
several ranks at stages 1 and 2 (an IndexError in its buckets), a loss through two engines at stage 0. Nor does it give
plain torch's numbers where a loss goes through an engine that is not frozen: that one's next update has its gradient.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import deepspeed_scripts as scripts
import numpy as np
import pytest
import torch

from megatron_ds.integrations import deepspeed
from megatron_ds.integrations.deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from megatron_ds.testing import run_ranks

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-bench/bin/python"
needs_peers = pytest.mark.skipif(not PEERS.exists(), reason="DeepSpeed is in .venv-bench, which `make bench` makes")
STAGES = (1, 2, 3)
SMALL = (
    "several_groups", "callables", "optimizer_and_scheduler", "collated", "given_as", "evaluated", "own_boundary",
    "boundary_logged", "scaled", "compiled", "destroyed", "generated", "preferences", "scheduled", "low_rank",
    "recomputed", "half_weights", "collectives",
)  # fmt: skip
RUNS = {
    1: [
        *(f"{name}:2" for name in SMALL),
        *("names:1", "classifier:2", "gan_frozen:1", "parts_of_a_checkpoint:1", "pipeline:1", "pipeline_evaluated:1"),
    ],
    2: [
        *(f"checkpoint:{stage}" for stage in STAGES),
        *("names:2", "names:3", "classifier:1", "classifier:3", "gan_frozen:2", "gan_frozen:3"),
        *(f"{name}:3" for name in ("evaluated", "own_boundary", "scaled", "generated", "low_rank", "half_weights")),
        *("parts_of_a_checkpoint:2", "leaf_modules:3", "built_sharded:3", "several_groups:1", "collectives:0"),
        *("pipeline:1", "pipeline_of_two:1"),  # last: after a pipeline it saves no checkpoint of another model
    ],
}
WITHOUT_WEIGHTS = ("names", "scaled", "collectives")
BOUND = 2e-6  # of numbers of about 1, after 6 to 24 updates in fp32


def by_deepspeed(ranks: int, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CHECKPOINTS": str(folder),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks),
    }  # fmt: skip
    common.pop("PYTHONPATH", None)
    started = [
        subprocess.Popen(
            [str(PEERS), scripts.__file__, *RUNS[ranks]],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = []
    for process in started:
        out, said = process.communicate(timeout=900)
        assert process.returncode == 0, said[-3000:]
        found.append(json.loads(out.splitlines()[-1]))
    return found


def here(wanted: list[str], folder: str) -> dict[str, scripts.Ran]:
    os.environ["CHECKPOINTS"] = folder
    return scripts.run(deepspeed, wanted, torch.float32)


def difference(got: Any, want: Any) -> float:
    if isinstance(want, list):
        every = [difference(a, b) for a, b in zip(got, want, strict=True)]
        return float(np.max(every, initial=0.0))  # a NaN is the largest
    return abs(got - want)


@needs_peers
@pytest.mark.parametrize("ranks", RUNS)
def test_deepspeed_itself_gives_the_same_numbers(ranks: int, tmp_path: Path) -> None:
    theirs = by_deepspeed(ranks, tmp_path / "theirs")
    ours = run_ranks(here, ranks, RUNS[ranks], str(tmp_path / "ours"), timeout=300)
    for mine, of_rank in zip(ours, theirs, strict=True):
        for name, want in of_rank.items():
            got = mine[name]
            assert difference(got.losses, want["losses"]) < BOUND, name
            assert difference(got.rates, want["rates"]) < 1e-12, name
            assert len(got.losses) == len(want["losses"]) > 0, name
            frozen = got.weights.keys() - want["weights"].keys()  # its tool leaves them out at stage 1
            assert frozen <= {"frozen.weight", "frozen.bias"}, name
            assert bool(want["weights"]) != name.startswith(WITHOUT_WEIGHTS), name
            for parameter, value in want["weights"].items():
                assert difference(got.weights[parameter], value) < BOUND, (name, parameter)
    for stage in STAGES if ranks > 1 else ():
        want = theirs[0][f"checkpoint:{stage}"]["weights"]
        read = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "theirs" / str(stage))
        assert {name: read[name].tolist() for name in want} == want  # in every bit
