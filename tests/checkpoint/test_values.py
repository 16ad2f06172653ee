"""Values through a checkpoint's meta data come back as they were given, types included, or are refused by name."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ds.checkpoint import FlatShard, load, save
from megatron_ds.checkpoint.values import decode, encode
from megatron_ds.errors import CheckpointError
from megatron_ds.testing import run_ranks

VALUES: list[Any] = [
    None, True, 0, 2**70, -1.5, 1e-320, "", "$tuple", [], {}, (), set(), b"\x00\xff",
    {3: 0.5, "t": (1, 2)},
    {"3": 0.5, 3: 0.25, 3.5: 1, None: 2, True: 3, (1, "a"): 4},
    {"$tuple": [1, 2]}, {"$dict": 1, "other": 2}, {"a": {"$float": "inf"}},
    [(1, [2, (3,)]), {4, 5}, frozenset({"a"})],
    Counter({30: 1, 80: 2}), OrderedDict([("b", 1), ("a", (2,))]),
    math.inf, [-math.inf, {"best": math.inf}],
    np.float64(0.1), np.float32(0.1), np.int64(7), np.bool_(True), np.arange(6, dtype=np.uint16).reshape(2, 3),
    torch.tensor(3), torch.tensor([[0.1, math.inf]]), torch.ones(3, dtype=torch.bfloat16) / 3, torch.zeros(0, 4),
    torch.tensor([True, False]), torch.get_rng_state(), random.getstate(), np.random.get_state(),
]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray | np.generic):
        return bool(a.dtype == b.dtype and np.array_equal(a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return bool(a == b)


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    text = json.dumps(encode(value, "value"), allow_nan=False)
    assert same(decode(json.loads(text)), value)


def test_nan_comes_back() -> None:
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan, "value"), allow_nan=False))))


def test_values_of_a_checkpoint(tmp_path: Path) -> None:
    meta = {"client_state": VALUES, "numbers": {0: {"step": 3.0}}}
    save(tmp_path, 1, [FlatShard.whole("w", "param", torch.ones(2))], meta)
    assert same(load(tmp_path, [FlatShard.whole("w", "param", torch.zeros(2))]), meta)


class Named(tuple[int, ...]):
    pass


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"a": [1, object()]}, r"state\['a'\]\[1\] is a object, which JSON cannot hold"),
        ({(1, Path("/x")): 1}, r"the key \(1, .*\) of state\[1\] is a pathlib"),
        ([Named((1, 2))], r"state\[0\] is a test_values.Named"),
        ([defaultdict(int)], r"state\[0\] is a collections.defaultdict"),
        ({"s": lambda step: step}, r"state\['s'\] is a function"),
        ([torch.ones(1 << 17)], r"state\[0\] is a torch.Tensor of shape \[131072\].*tensors of up to 65536 elements"),
        ([torch.ones(2, requires_grad=True)], r"state\[0\] is a torch.Tensor of shape \[2\]"),
        ([np.array([object()])], r"state\[0\] is a numpy.ndarray of shape \[1\]"),
    ],
)
def test_what_would_not_come_back_is_refused_by_name(value: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=name):
        save(tmp_path, 1, [FlatShard.whole("w", "param", torch.ones(2))], {"state": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"$pickle": "gAR9"}, "tagged '\\$pickle', which this library does not know"),
        ({"$tensor": ["save", [1], [0]]}, "tagged '\\$tensor' is malformed"),
        ({"$tensor": ["int64", [3], [0]]}, "tagged '\\$tensor' is malformed"),
        ({"$dict": [1]}, "tagged '\\$dict' is malformed"),
    ],
)
def test_a_damaged_value_is_an_error(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(value)


def refused_on_one_rank(folder: str) -> str:
    import torch.distributed as dist
    from test_checkpoint_ranks import world_axis

    state = {"own": object() if dist.get_rank() == 1 else 0}
    try:
        save(folder, 1, [], {"client_state": state}, world_axis())
    except CheckpointError as error:
        return str(error)
    return ""


def test_every_rank_learns_of_a_value_that_only_one_has(tmp_path: Path) -> None:
    for found in run_ranks(refused_on_one_rank, 2, str(tmp_path)):
        assert found.startswith("rank 1: client_state['own'] is a object")
