"""The dry run: its bytes are those the real run allocates, its layout is the real one, 16,384 ranks take seconds."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_ds.config import RunConfig, from_dict, load_toml, validate
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.gpt import GPTTask
from megatron_ds.pipeline.stage import LayerCosts
from megatron_ds.testing import device_of_rank, run_ranks
from megatron_ds.train.build import build
from megatron_ds.train.dry_run import dry_run
from megatron_ds.train.layout_table import layouts
from megatron_ds.zero.store.nvme import NvmeStore

LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied_embeddings": False}


def configuration(
    mesh: dict[str, int], model: dict[str, Any] | None = None, dtype: str = "fp32", **rest: dict[str, Any]
) -> RunConfig:
    sizes = {"num_layers": 5, "hidden_size": 32, "num_heads": 4, "kv_heads": 2, "vocab_size": 61, "vocab_multiple": 8}
    return from_dict(
        RunConfig,
        {
            "model": {**sizes, **(model or {})},
            "mesh": mesh,
            "precision": {"dtype": dtype},
            "data": {"synthetic": True},
            **rest,
            "train": {"steps": 4, "global_batch": 8, "sequence_length": 16, **rest.get("train", {})},
        },
        "test",
    )


def allocated(config: RunConfig) -> tuple[dict[str, int], int]:
    """What a real rank holds: bytes by kind as found in its optimizer, and of all new float tensors that there are.

    The second number knows nothing of the library's own books: it walks the garbage collector's list of objects.
    """
    gc.collect()
    before = {t.untyped_storage().data_ptr() for t in _float_tensors()}
    world = dist.get_world_size()
    mesh = Mesh.create(validate(config, world), device_of_rank(dist.get_rank(), world))
    parts = build(config, mesh, GPTTask(config))
    buckets = parts.optimizer.buckets
    found = {
        "parameters": _bytes(p for stage in parts.stages.values() for p in stage.parameters()),
        "gradients": _bytes(bucket.gradients.whole for bucket in buckets),
        "master": sum(row.nbytes for b in buckets for kind, row in b.state.acquire().items() if kind == "master"),
        "optimizer": sum(row.nbytes for b in buckets for kind, row in b.state.acquire().items() if kind != "master"),
    }
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _float_tensors()}
    return found, sum(size for pointer, size in storages.items() if pointer not in before)


def _float_tensors() -> list[torch.Tensor]:
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return [t for t in tensors if t.is_floating_point() and t.untyped_storage().nbytes() > 0]


def _bytes(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# By number of ranks. Without replicas every tensor of the process can be counted; replicas share memory.
ALONE = {
    1: [configuration({}), configuration({}, dtype="bf16")],
    2: [
        configuration({"tp": 2}, LLAMA, "bf16"),
        configuration({"pp": 2}, LLAMA, "fp16", optimizer={"name": "sgd", "momentum": 0.9}),
    ],
    4: [
        configuration({"tp": 2, "pp": 2}, dtype="fp64", pipeline={"layers_per_stage": [2, 3]}),
        configuration({"tp": 2, "pp": 2}, {"qk_norm": True, "position": "none"}, zero={"bucket_mb": 0.01}),
    ],
}
REPLICATED = {
    2: [configuration({"dp": 2}, zero={"stage": 1}), configuration({"dp": 2}, zero={"stage": 0})],
    4: [
        configuration({"dp": 4}, dtype="bf16", zero={"stage": 1, "bucket_mb": 0.02}),
        configuration({"dp": 4}, dtype="bf16", zero={"stage": 0}),
        configuration({"tp": 2, "dp": 2}, LLAMA, "fp16", zero={"stage": 1}),
        configuration({"pp": 2, "dp": 2}, dtype="fp64", zero={"stage": 1}),
        configuration({"pp": 2, "dp": 2}, LLAMA, zero={"stage": 0}, optimizer={"name": "sgd"}),
    ],
}


def allocated_by_each(configs: list[RunConfig]) -> list[tuple[dict[str, int], int]]:
    return [allocated(config) for config in configs]


@pytest.mark.parametrize("world", ALONE)
def test_without_replicas_bytes_are_those_of_all_tensors_there_are(world: int) -> None:
    for rank, results in enumerate(run_ranks(allocated_by_each, world, ALONE[world])):
        for config, (found, everything) in zip(ALONE[world], results):
            dry = dry_run(config, GPTTask(config), world, rank)
            assert dry.bytes == found, config
            # Besides: AdamW's counts of updates, rotary frequencies, attention slopes.
            assert dry.total_bytes <= everything <= dry.total_bytes + 2048, config
            assert dry.total_bytes > 40_000


@pytest.mark.parametrize("world", REPLICATED)
def test_with_replicas_bytes_of_each_kind_are_the_real_ones(world: int) -> None:
    for rank, results in enumerate(run_ranks(allocated_by_each, world, REPLICATED[world])):
        for config, (found, _) in zip(REPLICATED[world], results):
            assert dry_run(config, GPTTask(config), world, rank).bytes == found, config


def kept_by_each(configs: list[RunConfig]) -> list[Any]:
    """What a real rank keeps between steps: shards by the tensors' own sizes, and what its stores say they hold."""
    found = []
    for config in configs:
        mesh = Mesh.create(validate(config, dist.get_world_size()), torch.device("cpu"))
        zero = build(config, mesh, GPTTask(config)).optimizer
        shards = [bucket.gradients.shard.nbytes for bucket in zero.buckets if bucket.gradients is not None]
        whole = [b.parameters.whole.nbytes for b in zero._all if b.layout.key.unit is None]
        units = [b.parameters.holding.region for b in zero._all if b.layout.key.unit is not None]
        away = {id(store): store for store in (zero.stores[0]._state, zero.stores[0]._parameters)}.values()
        parameters = sum(whole) + sum(region.numel * region.dtype.itemsize for region in units)
        found.append((sum(shards), parameters, sum(store._size for store in away if isinstance(store, NvmeStore))))
        zero.close()
    return found


def test_bytes_of_sharded_and_offloaded_state_are_the_real_ones(tmp_path: Path) -> None:
    disk = {"device": "nvme", "path": str(tmp_path / "swap")}
    configs = [
        configuration({"dp": 2}, zero={"stage": 2}),
        configuration({"dp": 2}, dtype="bf16", zero={"stage": 3, "persistence_threshold": 100, "bucket_mb": 0.02}),
        configuration(
            {"dp": 2},
            dtype="bf16",
            zero={"stage": 3, "persistence_threshold": 100, "offload_optimizer": disk, "offload_parameters": disk},
        ),
    ]
    for rank, results in enumerate(run_ranks(kept_by_each, 2, configs)):
        for config, (gradients, parameters, on_disk) in zip(configs, results):
            dry = dry_run(config, GPTTask(config), 2, rank)
            assert (dry.bytes["gradients"], dry.bytes["parameters"]) == (gradients, parameters), config
            away = sum(places["disk"] for places in dry.places.values())
            # A swap file's regions are whole blocks of 4096 bytes.
            assert away <= on_disk <= away + 4096 * 100 if config is configs[-1] else away == on_disk == 0
            assert ("on the disk" in str(dry)) == (config is configs[-1])
    fresh = tmp_path / "none"
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "path": str(fresh)}}
    dry_run(configuration({"dp": 2}, zero=zero), GPTTask(configs[0]), 2)
    assert not fresh.exists(), "a dry run makes no swap files"


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_bubble_and_activations_in_flight_are_the_papers(schedule: str) -> None:
    """Equal stages idle for (p - 1) of m + p - 1 turns; GPipe holds all m micro-batches, 1F1B p - stage of them."""
    p, m = 4, 16
    config = configuration({"pp": p}, {"num_layers": 8}, pipeline={"schedule": schedule}, train={"global_batch": m})
    model = GPTTask(config)
    model.costs = LayerCosts(block=3.0)
    for stage in range(p):
        dry = dry_run(config, model, p, stage)
        assert dry.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
        assert dry.account.in_flight == (m if schedule == "gpipe" else p - stage)


def test_activations_are_those_of_the_micro_batches_in_flight() -> None:
    """Of each stage its own layers, as often as 1F1B keeps them; or a line that says they are not known."""
    config = configuration({"pp": 2}, {"num_layers": 4}, train={"global_batch": 8}, recompute={"mode": "full"})
    model = GPTTask(config)
    assert model.activations is not None
    for stage in range(2):
        dry = dry_run(config, model, 2, stage)
        assert (found := dry.account.activations) is not None
        assert found == model.activations(dry.spans[stage], 1, "cuda") and dry.account.in_flight == 2 - stage
        text = str(dry)
        assert f"{found.stored:,} bytes a micro-batch x {2 - stage} in flight" in text
        assert f"{found.stored * (2 - stage):,} bytes" in text and f"{found.recompute_peak:,} bytes" in text
    with patch.object(GPTTask, "activations", lambda *_: None):
        assert "not known" in str(dry_run(config, model, 2))


def test_what_is_printed_is_the_marked_ranks_own_place() -> None:
    config = configuration({"tp": 2, "pp": 2}, pipeline={"layers_per_stage": [2, 3]})
    text = str(dry_run(config, GPTTask(config), 8, 6))
    assert "mesh of 8 ranks: pp=2 x dp=2 x cp=1 x tp=2" in text
    assert "[6]" in text and text.count("[") == 1
    assert "rank 6: pp 1, dp 1, cp 0, tp 0" in text
    assert "stage 1: layers 2 to 4 with head" in text
    assert "layers a stage: 2 3" in text
    total = sum(dry_run(config, GPTTask(config), 8, 6).bytes.values())
    assert f"{total:,} bytes" in text


def test_of_a_large_mesh_the_neighbourhood_of_the_rank_is_drawn() -> None:
    shape = MeshShape(pp=40, dp=128, tp=8)
    for rank in (0, 8191, 20_000, shape.world_size - 1):
        drawn = shape.draw(rank)
        lines = drawn.splitlines()
        assert drawn.count(f"[{rank}]") == 1
        assert max(map(len, lines)) < 120 and len(lines) < 25
        place = shape.coordinates(rank)
        row = next(line for line in lines if f"[{rank}]" in line)
        assert row.startswith(f"stage {place['pp']}") and f"dp {place['dp']} " in drawn
        shown = sum(line.startswith("stage") for line in lines)
        left_out = sum(int(line.split()[1]) for line in lines if line.startswith("  ..."))
        assert shown + left_out == shape.pp


def test_sixteen_thousand_ranks_take_seconds() -> None:
    config = load_toml(Path(__file__).parents[2] / "examples" / "configs" / "gpt3-175b.toml")
    config = config.model_copy(update={"data": config.data.model_copy(update={"synthetic": True})})
    before = time.process_time()
    dry = dry_run(config, GPTTask(config), 16_384, 16_383)
    assert time.process_time() - before < 15  # 1 s on a quiet machine
    assert dry.shape == MeshShape(pp=16, dp=128, tp=8)
    # A sixteenth of the layers and an eighth of each, with the last stage's copy of the tied embedding.
    layer = 12 * 12288**2 // 8
    assert 6 * layer < dry.local_parameters < 6 * layer * 1.01 + 50304 * 12288 // 8


def test_what_the_real_run_would_refuse_is_refused() -> None:
    config = configuration({"tp": 2})
    for world, rank, message in ((2, 2, "use 0 to 1"), (3, 0, "world_size=3 cannot be divided"), (2, -1, "--rank -1")):
        with pytest.raises(ConfigError, match=message):
            dry_run(config, GPTTask(config), world, rank)
    with pytest.raises(ConfigError, match="layers_per_stage"):
        wrong = configuration({"pp": 2}, pipeline={"layers_per_stage": [1, 1]})
        dry_run(wrong, GPTTask(wrong), 2)
    assert not dist.is_initialized()


def test_the_layers_in_fp8_are_said_and_what_a_gpu_refuses_is_found() -> None:
    fp8 = {"dtype": "bf16", "fp8": "blockwise", "fp8_min_features": 32, "fp8_block": 16}
    sizes = {"num_layers": 2, "hidden_size": 64, "kv_heads": 4, "ffn_hidden_size": 128}
    config = from_dict(RunConfig, {**configuration({"tp": 2, "pp": 2}, sizes).to_dict(), "precision": fp8}, "test")
    assert "FP8 (blockwise): 8 of 8 linear layers" in str(dry_run(config, GPTTask(config), 4))
    for change, message in (
        ({"fp8_min_features": 65}, "finds no layer to compute in FP8"),
        ({"fp8_block": 128}, r"layers.0.attention.qkv.*: 96 consecutive features"),
        ({"fp8_exclude": ("layers.7.*",)}, "names no linear layer; they are layers.0.attention.qkv"),
    ):
        wrong = config.model_copy(update={"precision": config.precision.model_copy(update=change)})
        with pytest.raises(ConfigError, match=message):
            dry_run(wrong, GPTTask(wrong), 4)


def test_the_table_of_layouts_has_the_bytes_of_a_dry_run_of_each() -> None:
    """On 8 ranks, for a model of 4 heads: 8 do not share them, and 3 data-parallel ranks would need another batch."""
    table = layouts(configuration({"tp": 2}), GPTTask, 8, gpu_gb=0.0005)
    assert {(s.tp, s.pp, s.dp) for s in table.sizes} == {
        *((1, 1, 8), (1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 2, 2), (2, 4, 1), (4, 1, 2), (4, 2, 1)),
    }
    for shape, cells in table.sizes.items():
        for name, stage, recompute in (("zero 1", 1, "none"), ("zero 3", 3, "none"), ("2, full", 2, "full")):
            mesh = {"tp": shape.tp, "pp": shape.pp}
            config = configuration(mesh, zero={"stage": stage}, recompute={"mode": recompute})
            runs = (dry_run(config, GPTTask(config), 8, rank) for rank in range(8))
            ends = [run for run in runs if shape.coordinates(run.rank)["pp"] in (0, shape.pp - 1)]
            assert cells[name] == max(run.account.total("device") for run in ends)
    head, _, _, *rows = str(table).splitlines()
    assert "fits 90% of 0 GB" in head and len(rows) == 8 and "*" in rows[0] + rows[-1]
    assert set(layouts(configuration({"tp": 2}, train={"global_batch": 9}), GPTTask, 8, 80).sizes) == {
        MeshShape(pp=4, dp=1, tp=2),
        MeshShape(pp=2, dp=1, tp=4),
    }
