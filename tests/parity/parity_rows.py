"""The rows of the parity matrix: every mesh up to 8 ranks, crossed with the settings so that all pairs occur.

A *setting* is a factor of a run other than its mesh; some matter only on some meshes (sequence parallelism does
nothing on one tensor-parallel rank). :func:`matrix` gives rows in which

* every level of every setting occurs on every mesh, and
* every two levels of two settings occur together on a mesh where both matter.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from types import MappingProxyType
from typing import Any, TypeVar

from parity_schedules import schedule_of_row

from megatron_ds.config import BaseRunConfig, RunConfig, from_dict
from megatron_ds.pipeline.placement import Placement
from megatron_ds.pipeline.schedule import Schedule

SETTINGS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "sequence_parallel": (False, True),
        "zero": (0, 1, 2, 3),
        "keep_whole": (False, True),
        "offload": ("none", "cpu", "nvme"),
        "hybrid": (False, True),  # shards over half of the replicas
        "accumulation": (1, 4),
        "micro_batch": (1, 2),
        "recompute": ("none", "selective", "full", "every_n"),
        "tied": (False, True),
        "architecture": ("gpt2", "llama", "bloom", "bert"),
        "split": ("even", "uneven", "cost"),
        "schedule": ("1f1b", "gpipe"),
        "stages": ("one", "looped", "v"),  # how many a rank holds, and where they lie
        "split_backward": (False, True),  # weight gradients in actions of their own
        "optimizer": ("adamw", "sgd", "muon"),
        "smoothing": (False, True),  # label smoothing and z-loss
        "dropout": (False, True),
        "documents": (False, True),
        "qk_norm": (False, True),
        "overlap": (False, True),
        "bucket_mb": (25.0, 0.008),
    }
)
_NEEDS = {
    "sequence_parallel": "tp",
    "zero": "dp",
    "keep_whole": "dp",
    "offload": "dp",
    "hybrid": "dp",
    "overlap": "dp",
    "split": "pp",
    "schedule": "pp",
}
ROWS_A_MESH = 4
STEPS = 3
"""That a run takes at most."""
UNUSED_STEPS = 2
"""Steps of a run that are not taken: its learning rate never reaches the end of its decay."""
Mesh3 = tuple[int, int, int]
C = TypeVar("C", bound=BaseRunConfig)


@dataclass(frozen=True)
class Row:
    """One run of the matrix."""

    mesh: Mesh3  # tp, pp, dp
    sequence_parallel: bool = False
    zero: int = 0
    keep_whole: bool = False  # of stages 2 and 3
    offload: str = "none"  # of stages 1 to 3
    hybrid: bool = False
    accumulation: int = 1
    micro_batch: int = 1
    recompute: str = "none"
    tied: bool = True
    architecture: str = "gpt2"
    split: str = "even"
    schedule: str = "1f1b"
    stages: str = "one"
    split_backward: bool = False
    optimizer: str = "adamw"
    smoothing: bool = False
    dropout: bool = False
    documents: bool = False
    qk_norm: bool = False
    overlap: bool = True
    bucket_mb: float = 25.0
    muon_heads: bool = False
    fp8: str = "none"  # a factor of its own rows: rounding would hide small mistakes of the others

    def __str__(self) -> str:
        flags = [name for name in SETTINGS if getattr(self, name) is True]
        values = [self.architecture, self.recompute, self.split, self.schedule, self.stages, self.optimizer]
        values.append(f"zero{self.zero}" + (self.offload if self.offload != "none" else ""))
        values += [f"{self.accumulation}x{self.micro_batch}", f"bucket{self.bucket_mb:g}"]
        values += [self.fp8] if self.fp8 != "none" else []
        return "tp{}-pp{}-dp{}-".format(*self.mesh) + "-".join(values + flags)

    @property
    def world_size(self) -> int:
        tp, pp, dp = self.mesh
        return tp * pp * dp


def meshes(largest: int = 8) -> list[Mesh3]:
    """Every (tp, pp, dp) with a product of at most ``largest``."""
    sizes = range(1, largest + 1)
    return [(tp, pp, dp) for tp in sizes for pp in sizes for dp in sizes if tp * pp * dp <= largest]


def matters(setting: str, mesh: Mesh3) -> bool:
    """Whether the levels of a setting compute in different ways on this mesh."""
    sizes = dict(zip(("tp", "pp", "dp"), mesh))
    return setting not in _NEEDS or sizes[_NEEDS[setting]] > 1


Pair = tuple[str, Any, str, Any]


def pairs_of(row: Row) -> Iterator[Pair]:
    """The pairs of settings that a row is evidence for."""
    names = [name for name in SETTINGS if matters(name, row.mesh)]
    for first, second in combinations(names, 2):
        yield first, getattr(row, first), second, getattr(row, second)


def wanted_pairs() -> set[Pair]:
    return {
        (first, a, second, b)
        for first, second in combinations(SETTINGS, 2)
        for a in SETTINGS[first]
        for b in SETTINGS[second]
    }


@cache
def matrix(seed: int = 0, tries: int = 60) -> tuple[Row, ...]:
    """The rows, mesh by mesh: of some balanced draws of four, those that cover the most pairs not yet seen at the least
    cost."""
    chance = random.Random(seed)
    missing = wanted_pairs()
    rows: list[Row] = []
    for mesh in meshes():
        draws = [_balanced(mesh, chance) for _ in range(tries)]
        best = max(draws, key=lambda draw: _worth(draw, missing))
        for row in best:
            missing -= set(pairs_of(row))
        rows += best
    return tuple(rows)


def _worth(draw: list[Row], missing: set[Pair]) -> float:
    """The pairs that the rows add, less what they cost."""
    added = missing & {pair for row in draw for pair in pairs_of(row)} if missing else ()
    return len(added) - sum(map(layer_passes, draw)) / 15


def layer_passes(row: Row) -> int:
    """How often ranks pass a layer, which is what a row costs."""
    tp, _, dp = row.mesh
    return steps_of_row(row) * layers_of(row)[0] * row.accumulation * tp * dp


def _balanced(mesh: Mesh3, chance: random.Random) -> list[Row]:
    """Four rows in which each level of each setting occurs: accumulation, which multiplies what a row costs, in one."""
    columns = {}
    for name, levels in SETTINGS.items():
        column = list(levels) * (ROWS_A_MESH // len(levels))
        column += chance.sample(levels, ROWS_A_MESH - len(column))
        if name == "accumulation":
            column = [1, 1, 1, 4]
        chance.shuffle(column)
        columns[name] = column
    return [Row(mesh, **{name: column[i] for name, column in columns.items()}) for i in range(ROWS_A_MESH)]


ARCHITECTURES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt2": {"position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True},
        "llama": {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
        "bloom": {
            "position": "alibi",
            "norm": "layernorm",
            "activation": "gelu",
            "bias": True,
            "embedding_norm": True,
        },
        "bert": {
            "family": "bert",
            "position": "learned",
            "norm": "layernorm",
            "activation": "gelu",
            "bias": True,
            "embedding_norm": True,
            "token_types": 2,
        },
    }
)
VOCABULARY = 50


def sequence_length(tp: int) -> int:
    """Tokens a sample: about 8, and a multiple of tp whether or not the row splits the sequence."""
    return tp * -(-8 // tp)


def layers_of(row: Row) -> tuple[int, tuple[int, ...] | None]:
    """Number of layers and, for an uneven split, the layers of each stage."""
    stages = row.mesh[1] * chunks_of(row)
    if stages == 1:
        return 2, (2,) if row.split == "uneven" else None
    if stages == 2:
        return (4, None) if row.split == "even" else (3, (1, 2) if row.split == "uneven" else None)
    if row.split == "even":
        return stages, None
    return stages + 1, (2,) + (1,) * (stages - 1) if row.split == "uneven" else None


def steps_of_row(row: Row) -> int:
    """Steps that a row takes; two are enough where each has several micro-batches."""
    return STEPS if row.accumulation == 1 else 2


def chunks_of(row: Row) -> int:
    """Stages a rank holds."""
    return 1 if row.stages == "one" else 2


def schedules_of(row: Row) -> Schedule | None:
    """The schedule of the row's steps where the library has none of its name."""
    if row.stages == "one" and not row.split_backward:
        return None
    placement = Placement.of("v" if row.stages == "v" else "looped", row.mesh[1], chunks_of(row))
    return schedule_of_row(row.schedule, placement, row.accumulation, row.split_backward)


def _offload_of(row: Row) -> dict[str, Any]:
    """Where the state of a row is, and over how many replicas it is sharded."""
    path = tempfile.gettempdir() if row.offload == "nvme" else None
    offload = {"device": row.offload, "path": path, "ratio": 0.5 if row.offload == "cpu" else 1.0}
    return {
        "offload_optimizer": offload,
        "offload_parameters": offload if row.zero == 3 else {},
        "shard_size": row.mesh[2] // 2 if row.hybrid and row.mesh[2] % 2 == 0 else None,
    }


def _fp8_of(row: Row) -> dict[str, Any]:
    """All layers in FP8, with blocks of which the small model has several."""
    if row.fp8 == "none":
        return {}
    block = {"fp8_block": 4} if row.fp8 == "blockwise" else {}
    return {"fp8": row.fp8, "fp8_min_features": 0, "fp8_emulate": True, **block}


def config_of(row: Row) -> RunConfig:
    """The run of a row: the smallest model that its mesh can split, with padding rows that are a whole rank's share."""
    tp, pp, dp = row.mesh
    num_layers, layers_per_stage = layers_of(row)
    groups = 2 * tp if tp <= 3 else tp
    model = {
        "num_layers": num_layers,
        "hidden_size": 16,
        "num_heads": 2 * groups if row.architecture == "llama" else groups,
        "kv_heads": groups,
        "head_dim": 4,
        "ffn_hidden_size": tp * -(-20 // tp) if row.fp8 == "none" else 4 * tp * -(-5 // tp),
        "vocab_size": VOCABULARY,
        "vocab_multiple": 8 * tp,
        "max_positions": sequence_length(tp),
        "tied_embeddings": row.tied,
        "qk_norm": row.qk_norm,
        "init_std": 0.2,
        "hidden_dropout": 0.1 if row.dropout else 0.0,
        "attention_dropout": 0.2 if row.dropout else 0.0,
        **ARCHITECTURES[row.architecture],
    }
    values = {
        "model": model,
        "mesh": {"tp": tp, "pp": pp, "dp": dp, "sequence_parallel": row.sequence_parallel},
        "pipeline": {
            "schedule": row.schedule if row.stages == "one" else "gpipe",
            "chunks": chunks_of(row),
            "placement": "v" if row.stages == "v" else "looped",
            "split": "cost" if row.split == "cost" else "count",
            "layers_per_stage": layers_per_stage,
        },
        "zero": {
            "stage": row.zero,
            "bucket_mb": row.bucket_mb,
            "overlap": row.overlap,
            "keep_whole": row.keep_whole and row.zero > 1,
            **({"persistence_threshold": 40} if row.zero == 3 else {}),  # a few matrices a block are sharded
            **(_offload_of(row) if row.zero > 0 else {}),
        },
        "optimizer": {
            "name": row.optimizer,
            "lr": 0.02,
            "clip_norm": 0.5,
            "warmup_steps": 1,
            **({"momentum": 0.9} if row.optimizer == "sgd" else {}),
            **({"muon_dtype": "fp64", "muon_heads": row.muon_heads} if row.optimizer == "muon" else {}),
        },
        "precision": {"dtype": "fp64", **_fp8_of(row)},
        "recompute": {"mode": row.recompute, "every": 2},
        "data": {"prefix": "the test's own", "document_masking": row.documents},
        "train": {
            "steps": steps_of_row(row) + UNUSED_STEPS,
            "global_batch": dp * row.accumulation * row.micro_batch,
            "micro_batch": row.micro_batch,
            "sequence_length": sequence_length(tp),
            "label_smoothing": 0.15 if row.smoothing else 0.0,
            "z_loss": 0.01 if row.smoothing else 0.0,
        },
    }
    return from_dict(RunConfig, values, str(row))


def reference_config(config: C) -> C:
    """The same run on one process: one micro-batch, one stage, nothing recomputed, sharded or overlapped."""
    values = config.to_dict()
    values["mesh"] = {"sequence_parallel": False}
    values["pipeline"] = values["recompute"] = {}
    values["zero"] = {"stage": 0, "overlap": False}
    values["train"]["micro_batch"] = config.train.global_batch
    return from_dict(type(config), values, "the one-process run")
