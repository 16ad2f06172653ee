"""BERT: equal to transformers', every mesh trains what one process trains, and it does learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parity_run import Outcome, ParityError, assert_parity, reference, train
from torch import Tensor

from megatron_ds.checkpoint import Checkpoint, FlatShard, load, save
from megatron_ds.config import ModelConfig, RunConfig, from_dict, validate
from megatron_ds.convert.hugging_face import export_hf, import_hf
from megatron_ds.data.gpt_dataset import SyntheticDataset
from megatron_ds.data.masked_source import MaskedSource
from megatron_ds.mesh import Mesh
from megatron_ds.models.bert import BERT
from megatron_ds.models.families import task_of
from megatron_ds.models.text_task import layer_costs
from megatron_ds.models.transformer import StageSettings
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.shard import spec_of
from megatron_ds.testing import device_of_rank, run_ranks

MODEL: dict[str, Any] = {
    "family": "bert",
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "ffn_hidden_size": 24,
    "vocab_size": 50,
    "vocab_multiple": 16,
    "max_positions": 64,
    "token_types": 2,
    "embedding_norm": True,
    "activation": "gelu",
    "init_std": 0.2,
}
LENGTH = 64


def config(model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "model": {**MODEL, **(model or {})},
        "precision": {"dtype": "fp64"},
        "data": {"prefix": "the test's own", "document_masking": True},
        "optimizer": {"lr": 0.02, "warmup_steps": 1, "clip_norm": 0.5},
        "train": {"steps": 5, "global_batch": 4, "micro_batch": 1, "sequence_length": LENGTH},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return from_dict(RunConfig, values, "test")


def test_every_setting_of_the_masking_reaches_the_samples() -> None:
    data = {"prefix": None, "document_masking": False, "synthetic": True, "mask_token": 7, "mask_probability": 0.4}
    found = task_of(config(data=data).model_copy(update={"seed": 3})).open_sources().train
    want = MaskedSource(SyntheticDataset(50, LENGTH, 3), mask_id=7, vocab_size=50, probability=0.4, seed=3)
    for name, array in want.batch(range(20)).items():
        assert np.array_equal(found.batch(range(20))[name], array), name


# --- what it computes -------------------------------------------------------------------------------------------


def randomised(model: BERT) -> BERT:
    """Every weight random, norms and biases too; padding rows as well, which nothing may show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(1 + noise if spec_of(parameter).init == "ones" else noise)
    return model.eval()


def flat_shards(model: BERT) -> list[FlatShard]:
    return [FlatShard.of(spec_of(parameter), "param", parameter.data) for parameter in model.parameters()]


def test_logits_and_loss_are_those_of_transformers(tmp_path: Path) -> None:
    """Out to ``BertForMaskedLM`` and back in again, with token types and with padding."""
    from transformers import BertForMaskedLM

    ours = randomised(BERT(config().model))
    save(tmp_path / "ours", 1, flat_shards(ours), {"config": {"model": ours.config.model_dump(mode="json")}})
    export_hf(tmp_path / "ours", tmp_path / "hf")
    theirs = BertForMaskedLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(50, (2, 3, 20), generator=generator)
    types = torch.randint(2, (3, 20), generator=generator)
    there = torch.arange(20) < torch.tensor([20, 13, 6]).unsqueeze(1)
    chosen = there & (torch.rand(3, 20, generator=generator) < 0.4)
    batch = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": chosen,
        "position_ids": torch.arange(20).expand(3, 20),
        "token_type_ids": types,
        "document_ids": (~there).long(),
        "sample_index": torch.arange(3),
    }
    with torch.no_grad():
        want = theirs(tokens, attention_mask=there, token_type_ids=types).logits
        assert (ours.logits(batch) - want)[there].abs().max() < 2e-5
        loss = F.cross_entropy(want[chosen], labels[chosen], reduction="sum")
        torch.testing.assert_close(ours(batch), loss, rtol=1e-5, atol=0)

        # A model that transformers has saved, into ours.
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        theirs.save_pretrained(tmp_path / "changed")
        import_hf(tmp_path / "changed", tmp_path / "imported", vocab_multiple=16)
        with Checkpoint(tmp_path / "imported") as checkpoint:
            again = BERT(ModelConfig(**checkpoint.meta["config"]["model"])).eval()
        load(tmp_path / "imported", flat_shards(again))
        want = theirs(tokens, attention_mask=there, token_type_ids=types).logits
        assert (again.logits(batch) - want)[there].abs().max() < 2e-5
        assert (ours.logits(batch) - want)[there].abs().max() > 1e-2


def test_a_token_hears_from_both_sides_and_only_its_document() -> None:
    model = BERT(config().model, StageSettings(dtype=torch.float64))
    model.initialize(3)
    documents = torch.arange(LENGTH).unsqueeze(0) // 40
    tokens = torch.randint(50, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens, "position_ids": torch.arange(LENGTH).unsqueeze(0), "document_ids": documents}
    with torch.no_grad():
        before = model.logits(batch)
        tokens[0, 30] = (tokens[0, 30] + 1) % 50
        moved = (model.logits(batch) != before).any(-1)[0]
    assert torch.equal(moved, documents[0] == 0)


def test_the_head_costs_what_its_matrices_say() -> None:
    m = config().model
    costs, net = layer_costs(m, LENGTH), BERT(m, StageSettings(device="meta", span=StageSpan(1, 2, embedding=False)))
    assert costs.head == 2 * (m.vocab_size * m.hidden_size + net.transform.weight.numel())
    assert task_of(config()).flops_per_token == 3 * (2 * costs.block + costs.head)


# --- on meshes --------------------------------------------------------------------------------------------------


def train_on_this_rank(run: RunConfig, fault: bool) -> Outcome:
    world = dist.get_world_size()
    mesh = Mesh.create(validate(run, world), device_of_rank(dist.get_rank(), world))
    if fault:  # the gradient of the head's layer, of which each rank sees its part of the sequence, is not summed

        def look(parts: Any) -> None:
            (stage,) = parts.stages.values()
            stage.transform.weight.register_hook(lambda grad: grad * (mesh.tp.rank == 0))

        return train(run, mesh, look)
    return train(run, mesh)


DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
SPARSE = {"attention": {"sparse": {"mode": "bigbird", "block": 16, "different_layout_per_head": True}}}
UNTIED = {**SPARSE, "tied_embeddings": False}
# ranks, model settings, other sections; each model is compared with its own run on one process.
RUNS: dict[str, tuple[int, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "tp2-pp2-sp": (4, DROPOUT, {"mesh": {"tp": 2, "pp": 2}, "train": {"label_smoothing": 0.1}}),
    "tp2-full": (2, DROPOUT, {"mesh": {"tp": 2, "sequence_parallel": False}, "recompute": {"mode": "full"}}),
    "sparse-tp2-sp": (2, SPARSE, {"mesh": {"tp": 2}, "data": {"document_masking": False}}),
    "sparse-untied-pp2": (2, UNTIED, {"mesh": {"pp": 2}, "data": {"document_masking": False}}),
    "dp2-zero3": (2, DROPOUT, {"mesh": {"dp": 2}, "zero": {"stage": 3, "persistence_threshold": 0}}),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_mesh_trains_what_one_process_trains(name: str) -> None:
    world, model, sections = RUNS[name]
    run = config(model, **sections)
    assert_parity(run_ranks(train_on_this_rank, world, run, False), reference(run))


@pytest.mark.parametrize("zero", [1, 3])
def test_training_leaves_a_next_sentence_head_as_it_is(zero: int) -> None:
    """Weight decay too, although nothing of the loss reaches it."""
    run = config({"sentence_head": True}, optimizer={"weight_decay": 0.5}, zero={"stage": zero})
    model = BERT(run.model, StageSettings(dtype=torch.float64))
    model.initialize(run.seed)
    before = {spec_of(p).name: p.detach().numpy() for p in model.parameters()}
    parts = [part for outcome in run_ranks(train_on_this_rank, 2, run, False) for part in outcome.parameters]
    same = {part.name for part in parts if (part.of(before[part.name]) == part.values).all()}
    assert same == {f"{module}.{what}" for module in ("pooler", "sentence") for what in ("weight", "bias")}
    assert {part.name for part in parts} == before.keys()


def sentence_logits_of(run: RunConfig) -> Tensor:
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh = Mesh.create(validate(run, world), torch.device("cpu")) if world > 1 else Mesh.single()
    model = BERT(run.model, StageSettings(mesh, sequence_parallel=True, dtype=torch.float64))
    model.initialize(7)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) % 50
    with torch.no_grad():
        return model.eval().sentence_logits({"tokens": tokens, "position_ids": torch.arange(LENGTH).expand(2, LENGTH)})


def test_the_next_sentence_head_on_a_mesh() -> None:
    run = config({"sentence_head": True}, mesh={"tp": 2})
    for logits in run_ranks(sentence_logits_of, 2, run):
        torch.testing.assert_close(logits, sentence_logits_of(run), rtol=0, atol=1e-11)


def test_a_gradient_that_is_not_summed_would_be_seen() -> None:
    world, model, sections = RUNS["sparse-tp2-sp"]
    run = config(model, **sections)
    with pytest.raises(ParityError, match=r"first gradient that differs, in step 1: transform\.weight"):
        assert_parity(run_ranks(train_on_this_rank, world, run, True), reference(run))


def test_all_blocks_live_is_dense_attention() -> None:
    """``sparse`` reaches the encoder, in both directions: all layouts are compared in tests/kernels."""

    def logits(mode: str) -> Tensor:
        model = BERT(config({"attention": {"sparse": {"mode": mode}}}).model, StageSettings(dtype=torch.float64))
        model.initialize(3)
        tokens = torch.arange(LENGTH).unsqueeze(0) % 50
        with torch.no_grad():
            return model.logits({"tokens": tokens, "position_ids": torch.arange(LENGTH).unsqueeze(0)})

    torch.testing.assert_close(logits("dense"), logits("none"), rtol=0, atol=1e-11)
