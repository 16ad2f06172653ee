"""Any mesh to any mesh, exactly; and what lies on the disk is plain safetensors."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from checkpoint_state import KINDS, TENSORS, save_virtually, shards_of_rank, whole, wrong_shards
from safetensors import safe_open

from megatron_ds.checkpoint import Checkpoint, FlatShard, load, read_meta, resolve, save
from megatron_ds.checkpoint.save import prune
from megatron_ds.errors import CheckpointError
from megatron_ds.files.direct_io import ALIGNMENT
from megatron_ds.shard import ShardSpec

MESHES = [(1, 1), (2, 1), (1, 3), (4, 2), (2, 5), (4, 16)]


@pytest.mark.parametrize("saved", MESHES, ids=str)
def test_any_mesh_loads_from_any_mesh(tmp_path: Path, saved: tuple[int, int]) -> None:
    save_virtually(tmp_path, 1, *saved)
    for tp, zero in MESHES[:-1]:
        loaded: list[FlatShard] = []
        for rank in range(tp * zero):
            loaded += shards_of_rank(tp, rank % tp, zero, rank // tp, fill=None, replicas=True)
        load(tmp_path, loaded)
        assert wrong_shards(loaded) == []


def test_the_check_itself_sees_a_wrong_element(tmp_path: Path) -> None:
    save_virtually(tmp_path, 1)
    loaded = shards_of_rank(1, 0, 1, 0, fill=None)
    assert len(wrong_shards(loaded)) == len(loaded) - len(KINDS)  # all but the tensor without elements
    load(tmp_path, loaded)
    loaded[0].data[5] += 1
    assert wrong_shards(loaded) == ["param of embedding.weight [0, 144)"]


@pytest.mark.parametrize("saved_as", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loaded_as", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_are_converted_on_load(tmp_path: Path, saved_as: torch.dtype, loaded_as: torch.dtype) -> None:
    save_virtually(tmp_path, 1, dtype=saved_as)
    loaded = shards_of_rank(2, 1, 2, 1, fill=None, dtype=loaded_as, replicas=True)
    load(tmp_path, loaded)
    assert wrong_shards(loaded) == []
    assert {flat_shard.data.dtype for flat_shard in loaded} == {loaded_as}


def test_tensors_of_several_dtypes_share_a_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.bfloat16),
        "b": torch.randn(5, dtype=torch.float64),
        "c": torch.randn(7).to(torch.float8_e4m3fn),
        "d": torch.randn(2, 2),
    }
    save(tmp_path, 7, [FlatShard.whole(name, "param", tensor) for name, tensor in tensors.items()], {})
    with Checkpoint(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            got = checkpoint.read(name)
            assert got.dtype == tensor.dtype and torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_a_tensor_larger_than_a_chunk(tmp_path: Path) -> None:
    # 8 MB chunks: 3 files of about 12 MB, with a tensor that starts and ends inside chunks.
    tensor = torch.arange(9_000_001, dtype=torch.float32).view(-1, 1)
    flat_shard = FlatShard.whole("w", "param", tensor)
    save(tmp_path, 1, [FlatShard.whole("first", "param", torch.ones(3)), flat_shard], {})
    for verify, (start, stop) in product(
        (True, False), ((3_000_000, 6_000_000), (2_097_001, 2_097_300), (0, 9_000_001))
    ):
        got = FlatShard.whole("w", "param", torch.zeros_like(tensor)).cut(start, stop)
        rest = FlatShard.whole("first", "param", torch.zeros(3))
        load(tmp_path, [got, rest], verify=verify)
        assert torch.equal(got.data, tensor.flatten()[start:stop]) and torch.equal(rest.data, torch.ones(3))


class Staged:
    """State on a disk: in memory only while it is held, and in that of all the others."""

    memory = torch.empty(1_300_000)

    def __init__(self, values: torch.Tensor):
        self.values = values

    def acquire(self) -> torch.Tensor:
        return self.memory.copy_(self.values)

    def release(self, changed: bool) -> None:
        if changed:
            self.values = self.memory.clone()
        self.memory.fill_(torch.nan)


def test_what_is_in_memory_for_a_moment_is_saved_and_filled_in_that_moment(tmp_path: Path) -> None:
    """Chunks of 8 MB begin and end within the parts of 5 MB."""
    size = len(Staged.memory)

    def flat_shards(stores: list[Staged]) -> list[FlatShard]:
        specs = [ShardSpec(f"w{number}", (size,)) for number in range(len(stores))]
        return [FlatShard.from_holder(w, "param", s, 0, torch.float32, 0, size) for w, s in zip(specs, stores)]

    saved = [Staged(torch.arange(size) + 1000.0 * number) for number in range(4)]
    save(tmp_path, 1, flat_shards(saved), {})
    loaded = [Staged(torch.zeros(size)) for _ in saved]
    load(tmp_path, flat_shards(loaded))
    assert all(torch.equal(got.values, want.values) for got, want in zip(loaded, saved, strict=True))


def test_meta_comes_back(tmp_path: Path) -> None:
    meta = {"config": {"model": {"num_layers": 2, "rope_scaling": None}}, "consumed_samples": 2**53 + 1, "lr": 0.1}
    save(tmp_path, 3, [FlatShard.whole("w", "param", torch.ones(2))], meta)
    assert read_meta(tmp_path) == meta
    assert load(tmp_path, [FlatShard.whole("w", "param", torch.zeros(2))]) == meta


def test_files_are_plain_safetensors_with_aligned_data(tmp_path: Path) -> None:
    step = save_virtually(tmp_path, 1, tp=2, zero=1)
    files = sorted(step.glob("*.safetensors"))
    others = sorted(path.name for path in step.iterdir() if path not in files)
    assert len(files) == 2 and others == ["manifest.index", "manifest.json"]
    found: dict[str, torch.Tensor] = {}
    for path in files:
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % ALIGNMENT == 0
        with safe_open(path, "pt") as file:
            found.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    assert torch.equal(found["param/scale"], whole("scale", "param"))
    assert torch.equal(
        found["exp_avg/layers.0.mlp.down.weight@0,4"], whole("layers.0.mlp.down.weight", "exp_avg")[:, 4:]
    )
    assert sum(tensor.numel() for tensor in found.values()) == sum(
        whole(name, kind).numel() for name in TENSORS for kind in KINDS
    )


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    save_virtually(tmp_path, 1)
    loaded = shards_of_rank(1, 0, 1, 0, fill=None, kinds=("param",))
    load(tmp_path, loaded)
    assert wrong_shards(loaded) == []


def test_reader_names_shapes_and_values(tmp_path: Path) -> None:
    save_virtually(tmp_path, 12, dtype=torch.bfloat16)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.step == 12 and sorted(checkpoint.kinds()) == sorted(KINDS)
        assert sorted(checkpoint.names()) == sorted(TENSORS)
        for name, (shape, _) in TENSORS.items():
            assert checkpoint.shape(name) == shape and checkpoint.dtype(name) == torch.bfloat16
            for kind in KINDS:
                assert torch.equal(checkpoint.read(name, kind), whole(name, kind, torch.bfloat16))
        with pytest.raises(CheckpointError, match=r"holds no param .*; did you mean .layers\.0\.mlp"):
            checkpoint.read("layers.0.mlp.dwn.weight")


def test_a_folder_may_be_called_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside a checkpoint, as its tokenizer, is found from it."""
    step = save(tmp_path, 4, [FlatShard.whole("a", "param", torch.zeros(2))], {"n": 1})
    for folder in (tmp_path, step):
        monkeypatch.chdir(folder)
        assert resolve(".") == step and read_meta(".") == {"n": 1}


def test_the_newest_are_kept_and_latest_follows(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save_virtually(tmp_path, step, tp=1, zero=1)
        prune(tmp_path, step, 2)
        assert resolve(tmp_path).name == f"step-{step:08d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000030", "step-00000040"]
    # Taken up again from step 30: the later step of the abandoned line is nobody's to remove.
    save_virtually(tmp_path, 35, tp=1, zero=1)
    prune(tmp_path, 35, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000035", "step-00000040"]
    assert resolve(tmp_path).name == "step-00000035"


def test_the_same_step_is_refused_or_replaced(tmp_path: Path) -> None:
    one = [FlatShard.whole("w", "param", torch.ones(2))]
    save(tmp_path, 5, one, {"run": 1})
    with pytest.raises(CheckpointError, match="step-00000005 exists already"):
        save(tmp_path, 5, one, {"run": 2})
    assert read_meta(tmp_path) == {"run": 1}
    save(tmp_path, 5, one, {"run": 2}, replace=True)
    assert read_meta(tmp_path) == {"run": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


@pytest.mark.parametrize(
    ("flat_shards", "message"),
    [
        ([FlatShard("w", "param", (4,), (0,), (4,), 0, 3, torch.zeros(3))], "has 4 elements .* gave 3 to save"),
        (
            [
                FlatShard("w", "param", (4,), (0,), (4,), 0, 3, torch.zeros(3)),
                FlatShard("w", "param", (4,), (0,), (4,), 2, 4, torch.zeros(2)),
            ],
            "has 4 elements .* gave 5 to save",
        ),
        (
            [
                FlatShard("w", "param", (4,), (0,), (4,), 0, 2, torch.zeros(2)),
                FlatShard("w", "param", (4,), (0,), (4,), 2, 4, torch.zeros(2).double()),
            ],
            "all parts of a tensor must agree",
        ),
    ],
)
def test_gaps_overlaps_and_contradictions_are_refused(
    tmp_path: Path, flat_shards: list[FlatShard], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 1, flat_shards, {})
    assert list(tmp_path.iterdir()) == []
