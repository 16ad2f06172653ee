"""Whole fp32 weights out of checkpoints of ZeRO: DeepSpeed's own, written by hand as it lays them out, and ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import deepspeed_scripts as scripts
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.integrations import deepspeed
from megatron_ds.integrations.deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    convert_zero_checkpoint_to_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from megatron_ds.testing import run_ranks

ROOT = Path(__file__).parents[2]
PEERS = Path(os.environ.get("PEERS", ROOT / ".venv-bench")) / "bin/python"
TAG, RANKS = "global_step2", 2
GROUPS: list[dict[str, tuple[int, ...]]] = [{"embed.weight": (7, 5), "body.weight": (3, 5)}, {"body.bias": (3,)}]
FROZEN = {"frozen.weight": (3, 3)}


class Enum:
    """Pickled under DeepSpeed's name of the stage's class, with the stage as its argument."""

    def __init__(self, stage: int):
        self.stage = stage

    def __reduce__(self) -> Any:
        return Enum, (self.stage,)


Enum.__module__, Enum.__qualname__ = "deepspeed.runtime.zero.config", "ZeroStageEnum"


@pytest.fixture(autouse=True)
def pickles_name_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pickle looks up when it writes the name of a class; the reader must not need it."""
    for name in ("deepspeed", Enum.__module__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[Enum.__module__], "ZeroStageEnum", Enum, raising=False)


class Call:
    """A pickle that calls a function where a reader lets it."""

    def __init__(self, function: Any, *arguments: str):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))


def whole() -> dict[str, Tensor]:
    found = {name: value(name, shape) for group in (*GROUPS, FROZEN) for name, shape in group.items()}
    return found | {"head.weight": found["embed.weight"], "norm.mean": torch.ones(2), "norm.count": torch.tensor(3)}


def cut(flat: Tensor, multiple: int) -> list[Tensor]:
    return list(torch.nn.functional.pad(flat, (0, -flat.numel() % multiple)).chunk(RANKS))


def write(folder: Path, stage: int, half: bool = False, client: Any = None) -> Path:
    """A checkpoint of two ranks as DeepSpeed lays it out; of ``half`` precision the model's own file has bf16."""
    path = folder / TAG
    path.mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    tensors, dtype = whole(), torch.bfloat16 if half else torch.float32
    sizes = [{name: torch.Size(shape) for name, shape in group.items()} for group in GROUPS]
    common = {
        "buffer_names": ["norm.mean", "norm.count"],
        "param_shapes": sizes,
        "shared_params": {"head.weight": "embed.weight"},
        "ds_version": "0.19.8",
        "epoch": client,
    }
    module = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    parts: list[list[Tensor]] = [[] for _ in range(RANKS)]
    if stage < 3:
        frozen = {n: module[n] for n in FROZEN} if stage == 2 else None
        shapes = {n: torch.Size(s) for n, s in FROZEN.items()} if stage == 2 else None
        state = common | {"module": module, "frozen_param_shapes": shapes, "frozen_param_fragments": frozen}
        torch.save(state, path / "mp_rank_00_model_states.pt")
        for group in GROUPS:
            flat = torch.cat([tensors[name].flatten() for name in group])
            for rank, part in enumerate(cut(flat, 2 * RANKS)):
                parts[rank].append(part)
    else:
        for rank in range(RANKS):
            flat_frozen = {name: cut(module[name].flatten(), RANKS)[rank] for name in FROZEN}
            shapes = {n: torch.Size(s) for n, s in FROZEN.items()}
            own = {name: module[name] for name in common["buffer_names"]}
            state = common | {"module": own, "frozen_param_shapes": shapes, "frozen_param_fragments": flat_frozen}
            torch.save(state, path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            flat = torch.cat([cut(tensors[name].flatten(), RANKS)[rank] for group in GROUPS for name in group])
            parts[rank] = [flat[:10], flat[10:]]  # a border between subgroups lies inside a parameter
    for rank in range(RANKS):
        optimizer = {
            "loss_scaler": Enum(0),
            "zero_stage": Enum(stage),
            "partition_count": RANKS if stage == 3 else [RANKS] * len(GROUPS),
            "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups": parts[rank],
        }
        name = f"{'bf16_' if half else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.19.8"}, path / name)
    return path


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_checkpoints_are_read(stage: int, half: bool, tmp_path: Path) -> None:
    write(tmp_path, stage, half)
    want = whole()
    if half:  # of what is not trained there is no fp32
        want["frozen.weight"] = want["frozen.weight"].bfloat16().float()
    got = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert got.keys() == want.keys() and got["head.weight"] is got["embed.weight"]
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    trained = get_fp32_state_dict_from_zero_checkpoint(tmp_path, TAG, exclude_frozen_parameters=True)
    assert trained.keys() == want.keys() - FROZEN.keys()


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    copies = Call(shutil.copy, __file__, str(tmp_path / "copied"))
    write(tmp_path / "made", 2, client={"x": copies, "seen": [Enum(3)]})
    assert len(get_fp32_state_dict_from_zero_checkpoint(tmp_path / "made")) == len(whole())
    write(tmp_path / "worse", 2, client=Call(os.system, f"touch {tmp_path / 'ran'}"))
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt cannot be read.*system"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path / "worse")
    assert not (tmp_path / "copied").exists() and not (tmp_path / "ran").exists()


def test_a_model_takes_the_weights(tmp_path: Path) -> None:
    write(tmp_path, 3)
    model = nn.ModuleDict({"body": nn.Linear(5, 3), "other": nn.Linear(1, 1)})
    assert load_state_dict_from_zero_checkpoint(model, tmp_path) is model
    assert torch.equal(model["body"].weight, value("body.weight", (3, 5)))


@pytest.mark.parametrize("safe", [False, True])
def test_the_weights_are_written_as_from_pretrained_reads_them(safe: bool, tmp_path: Path) -> None:
    write(tmp_path / "in", 2)
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "in", tmp_path / "one", safe_serialization=safe)
    load: Any = load_file if safe else (lambda path: torch.load(path, weights_only=True))
    ending = "model.safetensors" if safe else "pytorch_model.bin"
    one = load(tmp_path / "one" / ending)
    assert one.keys() == whole().keys() and all(torch.equal(one[k], v) for k, v in whole().items())
    convert_zero_checkpoint_to_state_dict(
        tmp_path / "in", tmp_path / "some", "bf16", max_shard_size=60, safe_serialization=safe
    )
    index = json.loads((tmp_path / "some" / f"{ending}.index.json").read_text())["weight_map"]
    assert index.keys() == whole().keys() and len(set(index.values())) > 1
    for name, file in index.items():
        found = load(tmp_path / "some" / file)[name]
        want = whole()[name]
        assert torch.equal(found, want.bfloat16() if want.is_floating_point() else want), name
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "in", tmp_path / "one", safe_serialization=safe)  # anew
    for more in ({"safe_serialization": not safe}, {"safe_serialization": safe, "max_shard_size": 60}):
        with pytest.raises(
            ConfigError, match=rf"one holds {ending}, of other weights, which from_pretrained might read"
        ):
            convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "in", tmp_path / "one", **more)
    assert [path.name for path in (tmp_path / "one").iterdir()] == [ending]


def damage(kind: str, path: Path) -> None:
    rank1 = path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    if kind == "missing":
        rank1.unlink()
    elif kind == "truncated":
        rank1.write_bytes(rank1.read_bytes()[:-300])
    elif kind == "flipped":
        data = bytearray(rank1.read_bytes())
        place = data.index(whole()["body.bias"].numpy().tobytes()[8:])  # rank 1's part of the second group
        data[place] ^= 1
        rank1.write_bytes(data)
    elif kind == "another":
        shutil.copy(path.parent / "other" / TAG / rank1.name, rank1)
    elif kind == "model":
        (path / "mp_rank_00_model_states.pt").unlink()
    elif kind == "rank2":
        shutil.copy(rank1, path / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    elif kind == "tensor parallel":
        shutil.copy(rank1, path / "zero_pp_rank_0_mp_rank_01_optim_states.pt")
    elif kind == "no zero":
        for file in path.glob("*optim*"):
            file.unlink()
    elif kind == "no dictionary":
        torch.save([1], rank1)
    elif kind == "another kind":
        torch.save({"optimizer_state_dict": {"zero_stage": 7}}, rank1)


DAMAGE = {
    "missing": r"of 2 ranks, and \*_optim_states\.pt of rank 1 are missing; copy the whole folder",
    "truncated": "cannot be read as a file of torch.save",
    "flipped": "is damaged: .* does not match its checksum",
    "another": "are of different checkpoints",
    "model": r"mp_rank_00_model_states\.pt is missing",
    "rank2": "of rank 2 are of another one",
    "tensor parallel": r"rank_01_optim_states\.pt: it is of a model divided over.*use DeepSpeed's own ds_to_univ",
    "no zero": "at stage 0 the weights are the entry 'module'",
    "no dictionary": "holds list, not the dictionary",
    "another kind": "is no part of a checkpoint of ZeRO stage 1, 2 or 3",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    write(tmp_path / "other", 3)
    damage(kind, path)
    with pytest.raises(CheckpointError, match=DAMAGE[kind]):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)


def test_parts_that_do_not_fit_together_are_noticed(tmp_path: Path) -> None:
    for stage in (2, 3):
        path = write(tmp_path / str(stage), stage)
        name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        for change, message in ((-4, "elements of"), (5, "and its fp32 weights")):
            for rank in range(RANKS):
                stem = path / name.replace("rank_0_mp", f"rank_{rank}_mp")
                sizes = [26 + change, 2] if stage == 2 else [28 + change]
                groups = [torch.zeros(size) for size in sizes]
                state = {"zero_stage": Enum(stage), "partition_count": RANKS, key: groups}
                torch.save({"optimizer_state_dict": state}, stem)
            with pytest.raises(CheckpointError, match=message):
                get_fp32_state_dict_from_zero_checkpoint(tmp_path / str(stage))
    with pytest.raises(CheckpointError, match="no file `latest`"):
        get_fp32_state_dict_from_zero_checkpoint(path)
    with pytest.raises(CheckpointError, match="has no checkpoint 'best'; give another tag"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path / "2", "best")
    write(tmp_path / "right", 1)
    for arguments, message in (({"dtype": "int8"}, "use fp32, fp16 or bf16"), ({"max_shard_size": "5 eggs"}, "5 eggs")):
        with pytest.raises(ConfigError, match=message):
            convert_zero_checkpoint_to_state_dict(tmp_path / "right", tmp_path / "out", **arguments)


# --- checkpoints of this library's engine


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.frozen = nn.Embedding(7, 5), nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.head(self.frozen(self.embed(ids)))
        return logits.square().mean()


def saved(folder: str, stage: int, half: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    config = scripts.config(stage, optimizer={"type": "AdamW", "params": {"lr": 0.1}}, bf16={"enabled": half})
    engine = deepspeed.initialize(model=Odd(), config=config)[0]
    for i in range(2):
        engine.backward(engine(torch.randint(0, 7, (4,), generator=torch.Generator().manual_seed(i))))
        engine.step()
    engine.save_checkpoint(folder)
    masters = {
        name: deepspeed.utils.safe_get_full_fp32_param(parameter)
        for name, parameter in engine.module.named_parameters()
    }
    return {name: value.float().tolist() for name, value in (engine.module_state_dict() | masters).items()}


@pytest.mark.parametrize(("ranks", "stage", "half"), [(1, 0, False), (2, 3, True)])
def test_our_checkpoints_give_the_master_weights(ranks: int, stage: int, half: bool, tmp_path: Path) -> None:
    want = run_ranks(saved, ranks, str(tmp_path), stage, half)[0]
    got = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert got.keys() == Odd().state_dict().keys() and got["calls"].dtype == torch.int64
    rounded = []
    for name, tensor in got.items():
        same = torch.tensor(want["embed.weight" if name == "head.weight" else name])
        assert torch.equal(tensor.float(), same) and tensor.dtype in (torch.float32, torch.int64), name
        rounded.append(torch.equal(tensor.float(), tensor.bfloat16().float()))
    assert not half or not all(rounded)  # the masters, not the bf16 copies
    assert not {"frozen.weight", "frozen.bias"} & get_fp32_state_dict_from_zero_checkpoint(tmp_path, None, True).keys()
    load_state_dict_from_zero_checkpoint(Odd(), tmp_path)


def test_the_tool_converts_and_says_what_is_wrong(tmp_path: Path) -> None:
    write(tmp_path / "in", 3)
    program = [sys.executable, str(ROOT / "tools/zero_to_fp32.py"), str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run([*program, "--safe_serialization", "-t", TAG], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "out/model.safetensors").keys() == whole().keys()
    failed = subprocess.run([*program, "--tag", "none"], capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 2 and "has no checkpoint 'none'" in failed.stderr and "Traceback" not in failed.stderr
