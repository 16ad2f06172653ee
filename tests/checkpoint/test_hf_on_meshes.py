"""A model of few key/value heads goes through meshes of more tensor-parallel ranks and out again, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_models import _llama
from safetensors.torch import load_file

from megatron_ds.checkpoint import Checkpoint, load, read_meta, save
from megatron_ds.config import RunConfig, from_dict, validate
from megatron_ds.convert.hugging_face import export_hf, import_hf
from megatron_ds.layers.linear import RepeatedKVLinear
from megatron_ds.mesh import Mesh
from megatron_ds.models.families import task_of
from megatron_ds.testing import run_ranks
from megatron_ds.train.build import build
from megatron_ds.train.initial_weights import load_weights


def save_again(source: str, target: str, sections: dict[str, dict[str, Any]], resume: bool) -> bool:
    """Load a checkpoint into a run on this mesh as one that starts from it, or resumes it; save it. Whether the
    mesh repeats key/value heads."""
    meta = read_meta(source)
    values = {
        "model": meta["config"]["model"],
        "data": {"synthetic": True},
        "train": {"sequence_length": 8, "global_batch": 2},
        "checkpoint": {"init_from": source},
        **sections,
    }
    config = from_dict(RunConfig, values, "test")
    mesh = Mesh.create(validate(config, dist.get_world_size()), torch.device("cpu"))
    task = task_of(config)
    parts = build(config, mesh, task)
    if resume:
        load(source, parts.optimizer.flat_shards(for_load=True), mesh.world)
        parts.optimizer.refresh_parameters()
    else:
        load_weights(config, task.tables, parts.optimizer, mesh)
    save(target, 1, parts.optimizer.flat_shards(), meta, mesh.world)
    return any(isinstance(module, RepeatedKVLinear) for module in parts.stages[0].modules())


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_repeated_key_value_heads_come_back_once(tmp_path: Path, kv_heads: int) -> None:
    """Import, start at tp 4, resume at tp 1, resume at tp 4 with ZeRO-3, and export after each."""
    model = _llama(num_attention_heads=8, hidden_size=32, num_key_value_heads=kv_heads, attention_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    model.save_pretrained(tmp_path / "hf")
    want = load_file(tmp_path / "hf" / "model.safetensors")
    import_hf(tmp_path / "hf", tmp_path / "0")
    wide: dict[str, dict[str, Any]] = {"mesh": {"tp": 4}}
    legs = [
        (4, wide),
        (1, {}),
        (8, {**wide, "zero": {"stage": 3, "persistence_threshold": 0}}),
        (2, {"mesh": {"tp": 2}}),
    ]
    for number, (ranks, sections) in enumerate(legs):
        source, target = str(tmp_path / str(number)), str(tmp_path / str(number + 1))
        repeats = run_ranks(save_again, ranks, source, target, sections, number > 0)
        assert repeats == [kv_heads < sections.get("mesh", {}).get("tp", 1)] * ranks
        export_hf(target, tmp_path / f"hf-{number}")
        found = load_file(tmp_path / f"hf-{number}" / "model.safetensors")
        assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want), sections
        with Checkpoint(target) as checkpoint:
            assert checkpoint.shape("layers.0.attention.qkv.weight") == (kv_heads, 8 // kv_heads + 2, 4, 32)
