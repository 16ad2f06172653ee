"""The only proof that a conversion is right: our model's logits are those of `transformers`, both ways."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hf_models import FAMILIES, MODELS, loaded, logits_of, make, our_logits, parameter_pieces, their_logits
from safetensors.torch import load_file, save_file

from megatron_ds.checkpoint import Checkpoint, save
from megatron_ds.config import ModelConfig
from megatron_ds.convert.hugging_face import export_hf, import_hf
from megatron_ds.models.bert import BERT
from megatron_ds.models.gpt import GPT
from megatron_ds.models.transformer import Transformer
from megatron_ds.shard import spec_of

TOKENS = torch.randint(2, 131, (2, 48), generator=torch.Generator().manual_seed(0))


def largest_difference(one: torch.Tensor, two: torch.Tensor) -> float:
    assert one.shape == two.shape
    return float((one - two).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_computes_the_same_logits(tmp_path: Path, name: str) -> None:
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ours")
    model = loaded(tmp_path / "ours")
    with torch.no_grad():
        want = theirs(TOKENS).logits
    assert largest_difference(our_logits(model, TOKENS), want) < 1e-5
    # The comparison sees a wrong weight: one swapped pair of rows of one layer's keys.
    weight = dict(model.named_parameters())["layers.1.attention.qkv.weight"].data
    weight[:, -2, [0, 1]] = weight[:, -2, [1, 0]]
    assert largest_difference(our_logits(model, TOKENS), want) > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_computes_the_same_logits(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    make(name).save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "imported")
    with Checkpoint(tmp_path / "imported") as checkpoint:
        meta = checkpoint.meta
    # The configuration of the import, but weights of our own, padding rows and all.
    model = GPT(ModelConfig(**meta["config"]["model"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(1 + noise if spec_of(parameter).init == "ones" else noise)
    save(tmp_path / "ours", 1, parameter_pieces(model), meta)
    export_hf(tmp_path / "ours", tmp_path / "back")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        want = theirs(TOKENS).logits
    assert largest_difference(our_logits(model, TOKENS), want) < 1e-5


def gradients_of_the_embedding(model: Transformer, theirs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the summed loss of the tokens in another order: ours, which went back through all, and theirs."""
    labels = TOKENS.roll(7, 1)
    places = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    batch = {"tokens": TOKENS, "labels": labels, "position_ids": places, "loss_mask": torch.ones_like(TOKENS).bool()}
    model({**batch, "sample_index": torch.arange(2)}).backward()
    F.cross_entropy(logits_of(theirs, TOKENS, grad=True).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours, gradient = model.embedding.weight.grad, theirs.get_input_embeddings().weight.grad
    assert ours is not None
    return ours[:131], gradient


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_both_ways(tmp_path: Path, name: str) -> None:
    """Equal logits and gradients in, every bit and the class and equal logits out."""
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ours")
    model = loaded(tmp_path / "ours")
    want = logits_of(theirs, TOKENS)
    assert largest_difference(our_logits(model, TOKENS), want) < 1e-5
    ours, gradient = gradients_of_the_embedding(model, theirs)
    assert largest_difference(ours, gradient) < 1e-5 * gradient.abs().max()
    export_hf(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert largest_difference(their_logits(tmp_path / "back", TOKENS), want) == 0.0
    # The comparison sees a wrong weight: one swapped pair of rows of one layer's keys.
    weight = dict(model.named_parameters())["layers.1.attention.qkv.weight"].data
    weight[:, -2, [0, 1]] = weight[:, -2, [1, 0]]
    assert largest_difference(our_logits(model, TOKENS), want) > 1e-4


def test_the_next_sentence_head_goes_both_ways(tmp_path: Path) -> None:
    """BertForPreTraining, in the names of the first files too; what it says of pairs of sentences is the same."""
    theirs, types = make("bert-pretraining"), (TOKENS % 2)
    theirs.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    old = {
        re.sub("Norm.weight$", "Norm.gamma", re.sub("Norm.bias$", "Norm.beta", n)): t
        for n, t in load_file(file).items()
    }
    save_file(old, file, {"format": "pt"})
    with torch.no_grad():
        want = theirs(TOKENS, token_type_ids=types).seq_relationship_logits
    for folder in ("hf", "back"):
        import_hf(tmp_path / folder, tmp_path / f"{folder}-ours")
        model = cast(BERT, loaded(tmp_path / f"{folder}-ours"))
        positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
        with torch.no_grad():
            found = model.eval().sentence_logits({"tokens": TOKENS, "token_type_ids": types, "position_ids": positions})
        assert largest_difference(found, want) < 1e-5
        if folder == "hf":
            export_hf(tmp_path / "hf-ours", tmp_path / "back")
    again = type(theirs).from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in theirs.state_dict().items())
