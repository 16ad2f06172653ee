"""GPT with block-sparse attention: every mesh trains what one process trains, settings are honoured or refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity_run import Outcome, ParityError, assert_parity, reference, train

from megatron_ds.config import RunConfig, from_dict, load_toml, parse, to_toml, validate
from megatron_ds.config.sparse import sparse_layout
from megatron_ds.convert.architecture import choose
from megatron_ds.convert.tables import ARCHITECTURES
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Mesh
from megatron_ds.models.gpt import GPT
from megatron_ds.models.text_task import layer_costs
from megatron_ds.models.transformer import StageSettings
from megatron_ds.testing import device_of_rank, run_ranks

LENGTH = 128
BIGBIRD = {"mode": "bigbird", "block": 16, "different_layout_per_head": True, "num_sliding_window_blocks": 1, "seed": 3}


def config(sparse: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    """A small legal run with grouped-query attention, with the given fields of the given sections changed."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 4,
            "kv_heads": 2,
            "head_dim": 4,
            "ffn_hidden_size": 24,
            "vocab_size": 50,
            "vocab_multiple": 16,
            "position": "rope",
            "init_std": 0.2,
        },
        "precision": {"dtype": "fp64"},
        "data": {"synthetic": True},
        "optimizer": {"lr": 0.02, "warmup_steps": 1, "clip_norm": 0.5},
        "train": {"steps": 5, "global_batch": 4, "micro_batch": 1, "sequence_length": LENGTH},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    values["model"]["attention"] = {"sparse": sparse}
    return from_dict(RunConfig, values, "test")


def train_on_this_rank(runs: list[RunConfig], first_heads: bool) -> list[Outcome]:
    """Inside a job: the runs, all of one mesh. ``first_heads`` is a fault: every rank takes head 0's layout and on."""
    world = dist.get_world_size()
    mesh = Mesh.create(validate(runs[0], world), device_of_rank(dist.get_rank(), world))
    if first_heads:
        right = GPT._layout
        GPT._layout = lambda model, length, device: right(_at_rank_0(model), length, device)  # type: ignore[method-assign]
    return [train(run, mesh) for run in runs]


def _at_rank_0(model: GPT) -> Any:
    class First:
        config, layouts = model.config, model.layouts

        class tp:  # noqa: N801
            rank, size = 0, model.tp.size

    return First


MESHES: dict[str, dict[str, Any]] = {
    "tp2": {"mesh": {"tp": 2, "sequence_parallel": False}},
    "tp2-sp-selective": {"mesh": {"tp": 2, "sequence_parallel": True}, "recompute": {"mode": "selective"}},
    "pp2": {"mesh": {"pp": 2}},
    "dp2": {"mesh": {"dp": 2}, "recompute": {"mode": "full"}},
}


@pytest.fixture(scope="module")
def one_process() -> Outcome:
    return reference(config(BIGBIRD))


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_trains_what_one_process_trains(name: str, one_process: Outcome) -> None:
    ranks = run_ranks(train_on_this_rank, 2, [config(BIGBIRD, **MESHES[name])], False)
    assert_parity([outcomes[0] for outcomes in ranks], one_process)


def test_a_rank_with_other_heads_layouts_would_be_seen(one_process: Outcome) -> None:
    ranks = run_ranks(train_on_this_rank, 2, [config(BIGBIRD, **MESHES["tp2"])], True)
    with pytest.raises(ParityError, match="loss of step 1"):
        assert_parity([outcomes[0] for outcomes in ranks], one_process)


def model_and_batch(sparse: dict[str, Any]) -> tuple[GPT, dict[str, torch.Tensor]]:
    model = GPT(config(sparse).model, StageSettings(dtype=torch.float64))
    model.initialize(1)
    tokens = torch.randint(50, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).expand(2, -1)
    return model, {"tokens": tokens, "position_ids": positions, "sample_index": torch.arange(2)}


def test_all_blocks_live_is_the_ordinary_model() -> None:
    plain, batch = model_and_batch({"mode": "none"})
    full, _ = model_and_batch({"mode": "dense", "block": 16})
    narrow, _ = model_and_batch({"mode": "sliding_window", "block": 16})
    with torch.no_grad():
        logits = plain.logits(batch)
        torch.testing.assert_close(full.logits(batch), logits, rtol=0.0, atol=1e-11)
        others = narrow.logits(batch)
    # The first two blocks see everything before them; later ones do not.
    torch.testing.assert_close(others[:, :32], logits[:, :32], rtol=0.0, atol=1e-11)
    assert (others[:, 48:] - logits[:, 48:]).abs().amax(-1).min() > 1e-6


def test_no_logit_hears_from_a_later_token() -> None:
    model, batch = model_and_batch({"mode": "bigbird", "block": 16, "num_random_blocks": 2})
    with torch.no_grad():
        before = model.logits(batch)
        for token in (1, 15, 16, 40, LENGTH - 1):
            changed = {**batch, "tokens": batch["tokens"].clone()}
            changed["tokens"][:, token:] = (changed["tokens"][:, token:] + 1) % 50
            after = model.logits(changed)
            assert torch.equal(after[:, :token], before[:, :token])
            assert (after[:, token] != before[:, token]).any()


def test_documents_and_alibi_are_refused_by_the_layer_too() -> None:
    model, batch = model_and_batch(BIGBIRD)
    with pytest.raises(ConfigError, match="no ALiBi, window, softcap, document masks or attention dropout"):
        model.logits({**batch, "document_ids": batch["tokens"] * 0})


def test_a_sparse_model_is_not_exported_as_a_dense_one() -> None:
    with pytest.raises(ConfigError, match=r"model.attention.sparse.mode='bigbird' cannot be exported"):
        choose(config(BIGBIRD).model, ARCHITECTURES)


def test_live_blocks_are_what_a_step_is_said_to_cost() -> None:
    m = config({"mode": "sliding_window", "block": 16}).model
    plain = layer_costs(config({"mode": "none"}).model, 1024).block
    live = 16 * 16 * (2 * 64 - 1)  # two blocks a row of 64, one in the first
    assert layer_costs(m, 1024).block - (plain - 4 * 1024 * 4 * 4) == pytest.approx(4 * live / 1024 * 4 * 4)


REFUSED: list[tuple[dict[str, Any], dict[str, dict[str, Any]], str]] = [
    (
        {"mode": "dense"},
        {"train": {"sequence_length": 100}},
        "train.sequence_length=100 is not a multiple of model.attention.sparse.block=64; use 64 or 128, or another "
        "block",
    ),
    (
        {"mode": "dense"},
        {"train": {"sequence_length": 40}},
        "train.sequence_length=40 is not a multiple of model.attention.sparse.block=64; use 64, or another block",
    ),
    (
        BIGBIRD,
        {"model": {"attention_dropout": 0.1}},
        "model.attention_dropout=0.1 with model.attention.sparse.mode='bigbird': sparse attention drops no "
        "probabilities; use model.attention_dropout=0 (model.hidden_dropout works)",
    ),
    (
        BIGBIRD,
        {"model": {"position": "alibi"}},
        "model.position='alibi' with model.attention.sparse.mode='bigbird': sparse attention has no biases; use "
        "'rope', 'learned' or 'none'",
    ),
    (
        BIGBIRD,
        {"data": {"prefix": "the test's own", "synthetic": False, "document_masking": True}},
        "data.document_masking with model.attention.sparse.mode='bigbird': a layout is the same for all samples, "
        "documents are not; use --data.no-document-masking, or model.attention.sparse.mode='none'",
    ),
    (
        {"mode": "bigbird", "num_local_blocks": 2},
        {},
        "model.attention.sparse.num_local_blocks=2 does nothing: mode='bigbird' takes block, "
        "different_layout_per_head, num_global_blocks, num_random_blocks, num_sliding_window_blocks, seed",
    ),
    (
        {"block": 16},
        {},
        "model.attention.sparse.block=16 does nothing: mode='none' takes no settings; choose another mode",
    ),
    (
        {"mode": "sliding_window", "num_sliding_window_blocks": 2},
        {},
        "model.attention.sparse: num_sliding_window_blocks=2 is even: it counts a block and as many on either side; "
        "use 1 or 3",
    ),
]


@pytest.mark.parametrize(("sparse", "sections", "message"), REFUSED)
def test_settings_that_do_not_go_together_are_refused(
    sparse: dict[str, Any], sections: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config(sparse, **sections), 1)
    assert str(refused.value) == message


def test_an_unknown_layout_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"model.attention.sparse.mode = 'longformer': .*'bslongformer'"):
        config({"mode": "longformer"})
    with pytest.raises(ConfigError, match=r"unknown key 'model.attention.sparse.blocks'; did you mean .*block"):
        config({"blocks": 16})
    with pytest.raises(ConfigError, match="block"):
        config({"mode": "dense", "block": 48})


def test_settings_read_back_from_files_and_from_the_command_line(tmp_path: Path) -> None:
    wanted = config({**BIGBIRD, "num_random_blocks": 2})
    file = tmp_path / "run.toml"
    file.write_text(to_toml(wanted))
    assert load_toml(file) == wanted
    file.write_text(to_toml(config({"mode": "variable", "local_window_blocks": [1, 2]})))
    assert load_toml(file).model.attention.sparse.num_random_blocks is None
    section = "--model.attention.sparse"
    given = parse(["--config", str(file), f"{section}.mode", "fixed", f"{section}.block", "32"])
    assert (given.model.attention.sparse.mode, given.model.attention.sparse.block) == ("fixed", 32)


def test_the_defaults_of_a_mode_are_the_layouts_own() -> None:
    variable = sparse_layout(config({"mode": "variable"}).model.attention.sparse, 1024, 1)
    assert int(variable.live_blocks()[0]) == 16 * 17 // 2 - 6 * 16 + 12, "windows of 4, column 0, nothing at random"


def test_the_example_is_a_legal_run_of_a_long_sequence(tmp_path: Path) -> None:
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    root = Path(__file__).parent.parent.parent
    command = ["bash", str(root / "examples" / "long_sequence.sh"), "--train.steps", "3"]
    shown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": str(echo)}, check=True)
    program, *arguments = shown.stdout.splitlines()
    assert program == str(root / "examples" / "pretrain_gpt.py")
    run = parse(arguments)
    validate(run, 1)
    assert (run.train.sequence_length, run.train.steps, run.model.attention.sparse.mode) == (8192, 3, "bigbird")
