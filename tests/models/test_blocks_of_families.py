"""The settings that tell families apart, several at a time: every mesh trains what one process trains, in float64.

What they compute is compared with ``transformers`` in tests/checkpoint/test_hf_logits.py.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from parity_run import Outcome, ParityError, assert_parity, reference, train

from megatron_ds import comm
from megatron_ds.config import RunConfig, from_dict, validate
from megatron_ds.errors import ConfigError
from megatron_ds.layers import norms
from megatron_ds.mesh import Mesh
from megatron_ds.models.families import class_of
from megatron_ds.models.text_task import layer_costs
from megatron_ds.models.transformer import StageSettings
from megatron_ds.testing import device_of_rank, run_ranks

LENGTH = 16
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
WINDOWS = {"window": 5, "attention_pattern": ("window", "full")}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
GEMMA: dict[str, Any] = {
    **WINDOWS, "position": "rope", "norm": "rmsnorm", "zero_centered_norm": True, "norm_position": "sandwich",
    "activation": "geglu_tanh", "bias": False, "embedding_scale": 4.0, "attention_scalar": 6.0, "qk_norm": True,
    "attention_softcap": 2.0, "logit_softcap": 3.0, "window_rope_theta": 100.0, "kv_heads": 2,
}  # fmt: skip
OLMO2: dict[str, Any] = {
    "position": "rope", "rope_scaling": YARN, "norm": "rmsnorm", "norm_position": "output", "activation": "swiglu",
    "bias": False, "qk_norm": True, "qk_norm_over": "projection", "kv_heads": 2, "tied_embeddings": False,
}  # fmt: skip
GPTJ: dict[str, Any] = {
    "position": "rope", "rotary_dim": 2, "rotary_interleaved": True, "residual": "parallel_one_norm", "bias": False,
    "mlp_bias": True, "head_bias": True,
}  # fmt: skip
MODERNBERT: dict[str, Any] = {
    **WINDOWS, "family": "bert", "position": "rope", "norm_position": "pre", "norm_bias": False, "bias": False,
    "activation": "geglu", "first_norm": False, "embedding_norm": True, "window_rope_theta": 100.0,
}  # fmt: skip
OPT = {"position_offset": 2, "activation": "relu", "norm_position": "post"}
KV2 = {"num_heads": 8, "head_dim": 2, "kv_heads": 2, "position": "alibi", "alibi": "rounded", "vocab_multiple": 32}
# ranks, model settings, other sections; each model is compared with its own run on one process.
RUNS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "gemma-tp2-pp2-sp": (4, {**GEMMA, **DROPOUT}, {"mesh": {"tp": 2, "pp": 2}, "recompute": {"mode": "selective"}}),
    "olmo2-tp2-dp2-zero3": (4, OLMO2, {"mesh": {"tp": 2}, "zero": {"stage": 3, "persistence_threshold": 0}}),
    "gpt-j-tp2": (
        2,
        {**GPTJ, **DROPOUT},
        {"mesh": {"tp": 2, "sequence_parallel": False}, "recompute": {"mode": "full"}},
    ),
    "neox-pp2": (2, {**GPTJ, "residual": "parallel"}, {"mesh": {"pp": 2}}),
    "modernbert-tp2-sp": (2, MODERNBERT, {"mesh": {"tp": 2}}),
    "kv1-tp4-sp": (4, {**GEMMA, "kv_heads": 1, "bias": True, **DROPOUT}, {"mesh": {"tp": 4}}),
    "kv2-tp4-zero2": (8, KV2, {"mesh": {"tp": 4, "sequence_parallel": False}, "zero": {"stage": 2}}),
    "opt-tp2-sp": (2, OPT, {"mesh": {"tp": 2}}),
}


def config(model: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    sizes = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 4,
        "ffn_hidden_size": 24,
        "vocab_size": 50,
        "vocab_multiple": 16,
    }
    values: dict[str, dict[str, Any]] = {
        "model": {**sizes, "max_positions": LENGTH, "init_std": 0.2, **model},
        "precision": {"dtype": "fp64"},
        "data": {"prefix": "the test's own", "document_masking": True},
        "optimizer": {"lr": 0.02, "warmup_steps": 1, "clip_norm": 0.5},
        "train": {"steps": 5, "global_batch": 4, "micro_batch": 1, "sequence_length": LENGTH},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return from_dict(RunConfig, values, "test")


def train_on_this_rank(run: RunConfig, fault: bool = False) -> Outcome:
    world = dist.get_world_size()
    mesh = Mesh.create(validate(run, world), device_of_rank(dist.get_rank(), world))
    if not fault:
        return train(run, mesh)
    with patch.object(norms.comm, "sum_over_region", comm.reduce_from_region):  # a backward pass without its sum
        return train(run, mesh)


@pytest.mark.parametrize("name", RUNS)
def test_every_mesh_trains_what_one_process_trains(name: str) -> None:
    world, model, sections = RUNS[name]
    run = config(model, **sections)
    assert_parity(run_ranks(train_on_this_rank, world, run), reference(run))


def test_a_mean_square_whose_gradient_stays_on_its_rank_would_be_seen() -> None:
    run = config(OLMO2, mesh={"tp": 2})
    with pytest.raises(ParityError, match="first gradient that differs, in step 1: embedding"):
        assert_parity(run_ranks(train_on_this_rank, 2, run, True), reference(run))


def test_a_window_is_how_far_a_token_hears() -> None:
    """Two layers of 5 hear 8 tokens back; one that sees all comes between them and the first."""
    for pattern, heard in ((("window",), 9), (("full", "window"), LENGTH)):
        model = class_of(c := config({**WINDOWS, "attention_pattern": pattern}).model)(
            c, StageSettings(dtype=torch.float64)
        )
        model.initialize(3)
        tokens = torch.arange(LENGTH).unsqueeze(0)
        batch = {"tokens": tokens, "position_ids": torch.arange(LENGTH).unsqueeze(0)}
        with torch.no_grad():
            before = model.logits(batch)
            tokens[0, 0] = 49
            moved = (model.logits(batch) != before).any(-1)[0]
        assert moved.tolist() == [place < heard for place in range(LENGTH)]


def test_keys_outside_of_a_window_cost_nothing() -> None:
    whole, windows = (layer_costs(config(m).model, LENGTH).block for m in ({}, WINDOWS))
    attention = 4 * LENGTH * 16
    assert whole - windows == attention * (1 - 5 / LENGTH) / 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"position": "rope", "rotary_dim": 3}, "need an even rotary_dim, not 3; use 2 or 4"),
        ({"position": "rope", "rope_scaling": {**YARN, "truncate": 1}}, "truncate=1 should be true or false"),
        ({"window": 4, "attention": {"sparse": {"mode": "dense", "block": 16}}}, "model.window=4 with model.attention"),
        ({"attention_softcap": 4.0, "attention": {"sparse": {"mode": "dense", "block": 16}}}, "softcap=4.0 with"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(config(model, data={"document_masking": False}), 1)
