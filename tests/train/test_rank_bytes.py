"""The byte account: the real run's on every rank, a published model's size, a thousand layouts from a few stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from test_dry_run import LLAMA, configuration

from megatron_ds.comm.local.shared_buffers import LocalGathered
from megatron_ds.config import RunConfig, from_dict, validate
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.gpt import GPTTask
from megatron_ds.testing import run_ranks
from megatron_ds.train.build import build
from megatron_ds.train.rank_bytes import StageBook, account_of
from megatron_ds.zero.byte_table import PLACES
from megatron_ds.zero.layout import ZeroLayout
from megatron_ds.zero.memory import WholeBuffer
from megatron_ds.zero.store import DeviceStore, HostStore, NvmeStore

CPU = {"device": "cpu"}
MESHES: list[dict[str, int]] = [{"dp": 4}, {"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}]
LLAMA_405B = {
    **{**LLAMA, "num_layers": 126, "hidden_size": 16384, "ffn_hidden_size": 53248, "num_heads": 128, "kv_heads": 8},
    **{"vocab_size": 128256, "max_positions": 8192},
}


def settings(disk: str) -> list[dict[str, Any]]:
    """Of ZeRO: every stage, with and without offload."""
    nvme = {"device": "nvme", "path": disk}
    return [
        {"stage": 0},
        {"stage": 1, "offload_optimizer": {**CPU, "ratio": 0.5}},
        {"stage": 2, "shard_size": 2},
        {"stage": 2, "offload_optimizer": nvme},
        {"stage": 3, "persistence_threshold": 100},
        {"stage": 3, "persistence_threshold": 100, "offload_optimizer": nvme, "offload_parameters": CPU},
    ]


def configurations(disk: str) -> list[RunConfig]:
    sizes = product(MESHES, settings(disk))
    found = [configuration(mesh, LLAMA, "bf16", zero={"bucket_mb": 0.02, **zero}) for mesh, zero in sizes]
    tied: dict[str, Any] = {"chunks": 2, "placement": "v", "schedule": "gpipe"}
    return [*found, configuration({"pp": 2, "dp": 2}, pipeline=tied), configuration({"pp": 4})]


@contextmanager
def counted(store: type[DeviceStore | HostStore], held: dict[str, int], place: str) -> Iterator[None]:
    """Add up the bytes of all regions that such stores hand out."""
    allocate: Any = store.allocate

    def counting(self: Any, name: str, numel: int, dtype: torch.dtype) -> Any:
        held[place] += numel * dtype.itemsize
        return allocate(self, name, numel, dtype)

    with patch.object(store, "allocate", counting):
        yield


def held_by_each(disk: str) -> list[tuple[ZeroLayout, dict[str, int]]]:
    """On a real rank: the layout of its optimizer, and bytes by place that its buffers and its stores hold."""
    found = []
    for config in configurations(disk):
        mesh = Mesh.create(validate(config, dist.get_world_size()), torch.device("cpu"))
        held = dict.fromkeys(PLACES, 0)
        with counted(DeviceStore, held, "device"), counted(HostStore, held, "host"):
            zero = build(config, mesh, GPTTask(config)).optimizer
        for bucket in zero._all:
            if isinstance(bucket.parameters, WholeBuffer):
                held["device"] += bucket.parameters.whole.nbytes
            elif isinstance(bucket.parameters._memory, LocalGathered):  # in memory that ranks share, not in a store
                held["device"] += bucket.parameters.shard.nbytes
            if isinstance(bucket.gradients, WholeBuffer):
                held["device"] += bucket.gradients.whole.nbytes
            elif bucket.gradients is not None:
                held["device"] += bucket.gradients.shard.nbytes
        for store in (zero.stores[0]._state, zero.stores[0]._parameters):
            if isinstance(store, NvmeStore):
                held["disk"] += store._size
                held["host"] += store._blocks.total
        found.append((zero.layout, held))
        zero.close()
    return found


def test_the_account_is_that_of_the_real_run_on_every_rank(tmp_path: Path) -> None:
    book = StageBook()
    for rank, results in enumerate(run_ranks(held_by_each, 4, str(tmp_path), timeout=120.0)):
        for config, (layout, held) in zip(configurations(str(tmp_path)), results):
            account = account_of(config, GPTTask(config), validate(config, 4), rank, book)
            found = account.layout.bytes()
            assert found == layout.bytes() and account.layout.offload == layout.offload, config
            sizes = [(b.size, b.shards, b.key.unit, b.key.shared) for b in account.layout.buckets]
            assert sizes == [(b.size, b.shards, b.key.unit, b.key.shared) for b in layout.buckets], config
            assert held["device"] == found.total("device"), config
            assert found.total("host") <= held["host"] <= found.total("host") + found.staging, config
            # A swap file's regions are whole blocks of 4096 bytes.
            assert 0 <= held["disk"] - found.total("disk") <= 4096 * 2 * len(sizes), config


def test_a_published_model_has_its_published_size() -> None:
    """Llama 3.1 405B: 405,853,388,800 parameters over the stages, each counted once."""
    config = from_dict(RunConfig, {"model": LLAMA_405B, "data": {"synthetic": True}}, "test")
    shape, book = MeshShape(pp=9), StageBook()
    accounts = [account_of(config, GPTTask(config), shape, rank, book) for rank in range(9)]
    assert sum(info.numel for account in accounts for info in account.layout.parameters) == 405_853_388_800
    assert book.built == 3, "the first, the last, and one for all stages between them"


def test_kinds_and_places_add_up() -> None:
    """What a rank needs at the fullest moment: activations of those in flight, and what is recomputed of one."""
    config = configuration({"pp": 2, "dp": 2}, LLAMA, "bf16", zero={"stage": 2}, recompute={"mode": "full"})
    account = account_of(config, GPTTask(config), MeshShape(pp=2, dp=2), 0)
    found, kept = account.bytes(), account.activations
    assert kept is not None and account.in_flight == 2
    assert found["activations"] == {"device": 2 * kept.stored + kept.recompute_peak}
    assert found["whole gradients"]["device"] > 0 and found["whole parameters"]["device"] == 0
    assert account.total("device") == sum(places.get("device", 0) for places in found.values())


@pytest.mark.parametrize("layouts", [1000])
def test_a_thousand_layouts_build_each_kind_of_stage_once(layouts: int) -> None:
    """A search over layouts of a 405B model: what costs time is building stages, of which there are few kinds."""
    base = from_dict(
        RunConfig,
        {
            "model": LLAMA_405B,
            "data": {"synthetic": True},
            "train": {"sequence_length": 8192, "global_batch": 4096},
            "precision": {"dtype": "bf16"},
        },
        "test",
    )
    pps, tps = (6, 9, 14, 18, 21, 42, 63), (1, 2, 4, 8)
    book, seen, smallest = StageBook(), 0, float("inf")
    for pp, tp, dp, stage, mode in islice(
        product(pps, tps, (4, 8, 16, 32), (1, 2, 3), ("none", "full", "selective")), layouts
    ):
        update = {"zero": base.zero.model_copy(update={"stage": stage})}
        config = base.model_copy(update={**update, "recompute": base.recompute.model_copy(update={"mode": mode})})
        account = account_of(config, GPTTask(config), MeshShape(pp=pp, dp=dp, tp=tp), dp * tp, book)
        smallest = min(smallest, account.total("device"))
        seen += 1
    assert seen == layouts and book.built == len(pps) * len(tps)
    # Of 18 bytes a parameter no rank can have less than a share.
    assert smallest > 18 * 405_853_388_800 / (63 * 8 * 32)
