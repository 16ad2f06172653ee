"""The model by itself: stages compose to the whole, weights do not depend on the split, sizes are as published."""

from __future__ import annotations

import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.config import ModelConfig, RecomputeConfig, RunConfig, from_dict
from megatron_ds.kernels.accumulate import add_product
from megatron_ds.layers import attention_cores
from megatron_ds.layers.recipe import OwnPrecision
from megatron_ds.mesh import Axis, Mesh
from megatron_ds.models.gpt import GPT, GPTTask
from megatron_ds.models.text_task import layer_costs
from megatron_ds.models.transformer import StageSettings
from megatron_ds.pipeline.executor import Executor
from megatron_ds.pipeline.layer_split import split_layers
from megatron_ds.pipeline.schedules import build_schedule
from megatron_ds.pipeline.stage import StageSpan, stage_spans
from megatron_ds.rng import DropoutKeys
from megatron_ds.shard import spec_of
from megatron_ds.zero.main_grad import MainGradient

GPT2: dict[str, Any] = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
LLAMA: dict[str, Any] = {
    "kv_heads": 2,
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "tied_embeddings": False,
    "qk_norm": True,
}
BLOOM: dict[str, Any] = {"position": "alibi", "embedding_norm": True}
B, S = 3, 8


def config(**settings: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 24,
        "num_heads": 4,
        "vocab_size": 37,
        "vocab_multiple": 12,
        "max_positions": S,
        "init_std": 0.2,
    }
    return ModelConfig(**{**base, **settings})


def model(settings: dict[str, Any], dtype: torch.dtype = torch.float64, **keywords: Any) -> GPT:
    result = GPT(config(**settings), StageSettings(dtype=dtype, dropout_seed=3, **keywords))
    result.initialize(5)
    return result


def with_tp(axis: Axis) -> Mesh:
    mesh = Mesh.single()
    mesh.tp = axis
    return mesh


def batch(documents: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(37, (B, S + 1), generator=generator)
    made = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "loss_mask": torch.rand(B, S, generator=generator) > 0.3,
        "position_ids": torch.arange(S).expand(B, -1),
        "sample_index": torch.tensor([4, 9, 2]),
    }
    if documents:
        made["document_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]]).expand(B, -1)
    return made


@pytest.mark.parametrize("settings", [GPT2, LLAMA, BLOOM], ids=["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("layers", [(4,), (1, 3), (2, 1, 1), (1, 1, 1, 1)], ids=str)
def test_stages_compose_to_the_whole(settings: dict[str, Any], layers: tuple[int, ...]) -> None:
    whole = model(settings)
    stages = [model(settings, span=span) for span in stage_spans(layers)]
    named = dict(whole.named_parameters())
    seen = set()
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, named[name]), name
            assert spec_of(parameter).name == name
            seen.add(name)
    assert seen == set(named)
    copies = [name for stage in stages for name, p in stage.named_parameters() if not spec_of(p).replica]
    assert sorted(copies) == sorted(named)  # each has one owner, the tied embedding too
    shared = [stage.shares_embedding for stage in stages]
    tied = whole.config.tied_embeddings and len(layers) > 1
    assert shared == [tied and i in (0, len(layers) - 1) for i in range(len(layers))]
    x = None
    for stage in stages:
        x = stage(batch(), x)
    assert x is not None and torch.equal(x, whole(batch()))


@pytest.mark.parametrize("settings", [GPT2, LLAMA, BLOOM], ids=["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("tp", [2, 4])
def test_shards_are_slices_of_the_one_process_weights(settings: dict[str, Any], tp: int) -> None:
    settings = {**settings, "kv_heads": 4}
    whole = dict(model(settings).named_parameters())
    for rank in range(tp):
        axis = Axis("tp", rank, tp, None, tuple(range(tp)))
        shard = model(settings, mesh=with_tp(axis), sequence_parallel=True)
        assert {name for name, _ in shard.named_parameters()} == set(whole)
        for name, parameter in shard.named_parameters():
            spec = spec_of(parameter)
            assert spec.global_shape == tuple(whole[name].shape)
            assert torch.equal(parameter, spec.slice_of(whole[name])), name
            assert spec.replica == (not spec.placements and rank > 0)


def test_loss_is_the_sum_of_cross_entropies_of_the_logits() -> None:
    for settings in (GPT2, LLAMA, BLOOM):
        net, b = model(settings).eval(), batch()
        logits = net.logits(b)
        assert logits.shape == (B, S, 37)
        want = F.cross_entropy(logits[b["loss_mask"]], b["labels"][b["loss_mask"]], reduction="sum")
        torch.testing.assert_close(net(b), want, rtol=1e-12, atol=0)


def test_evaluation_leaves_out_dropout_smoothing_and_z_loss() -> None:
    regularised = model(GPT2, label_smoothing=0.2, z_loss=0.1)
    plain = model({})
    assert regularised(batch()) != plain(batch())
    assert regularised.eval()(batch()) == plain(batch())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [GPT2, LLAMA, BLOOM], ids=["gpt2", "llama", "bloom"])
def test_recomputation_changes_no_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Nor does it in half precision, where no gradient of a matrix passes through it: main gradients are in fp32."""
    settings = {**settings, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    want = None
    for recompute in (
        RecomputeConfig(),
        RecomputeConfig(mode="selective"),
        RecomputeConfig(mode="full"),
        RecomputeConfig(mode="every_n", every=3),
    ):
        net = model(settings, dtype, recompute=recompute)
        for name, parameter in net.named_parameters() if dtype == torch.float16 else ():
            parameter.main_grad = MainGradient(name, lambda _: None, lambda _: None)  # type: ignore[attr-defined]
            parameter.main_grad.view = torch.zeros(parameter.shape)  # type: ignore[attr-defined]
        loss = net(batch())
        loss.backward(torch.tensor(1024.0, dtype=loss.dtype))
        assert all(p.grad is None or p.dim() == 1 for p in net.parameters()) == (dtype == torch.float16)
        got = [loss.detach(), *(p.main_grad.view if p.grad is None else p.grad for p in net.parameters())]
        want = want or got
        assert all(a is not None and torch.equal(a, b) for a, b in zip(got, want)), recompute


@pytest.mark.parametrize("position", ["pre", "post", "sandwich"])
def test_a_recomputed_block_leaves_out_its_last_product(position: str) -> None:
    """Where no norm takes it: of four products three come twice."""
    net, counts = model({"norm_position": position}, recompute=RecomputeConfig(mode="full")), [0, 0]

    def counted(recipe: OwnPrecision, *operands: Any, product: Any = OwnPrecision.product) -> Tensor:
        counts[0] += 1
        return product(recipe, *operands)

    with patch.object(OwnPrecision, "product", counted):
        loss = net(batch())
        counts[:] = 0, counts[0]
        loss.backward()
    assert counts == [4 * (3 if position == "pre" else 4), 4 * 4]


def test_which_blocks_are_recomputed() -> None:
    """By the layer's number in the whole model, so that the split does not change it."""
    calls: list[int] = []
    for recompute, span, expected in (
        (RecomputeConfig(mode="full"), None, [1, 1, 1, 1]),
        (RecomputeConfig(mode="every_n", every=2), None, [1, 0, 1, 0]),
        (RecomputeConfig(mode="every_n", every=3), None, [1, 0, 0, 1]),
        (RecomputeConfig(mode="every_n", every=3), StageSpan(2, 4, embedding=False), [0, 1]),
        (RecomputeConfig(mode="selective"), None, [0, 0, 0, 0]),
        (RecomputeConfig(), None, [0, 0, 0, 0]),
    ):
        net = model(GPT2, recompute=recompute, span=span)
        for index, block in enumerate(net.layers.values()):
            # Before the block: a recomputation stops as soon as it has what it needs.
            block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
        hidden = torch.randn(S, B, 24, dtype=torch.float64, requires_grad=True) if span else None
        calls.clear()
        net(batch(), hidden).backward()
        assert [calls.count(i) - 1 for i in range(len(net.layers))] == expected
        with torch.no_grad():
            calls.clear()
            net(batch(), hidden)
            assert all(calls.count(i) == 1 for i in range(len(net.layers)))


def test_documents_do_not_see_each_other() -> None:
    """A packed sample gives each document the logits it has alone, whatever the position encoding."""
    for settings in ({}, LLAMA, BLOOM):
        net = model(settings).eval()
        tokens = batch()["tokens"][:1]
        ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
        packed = net.logits(
            {"tokens": tokens, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), "document_ids": ids}
        )
        for document in (0, 1):
            here = ids[0] == document
            alone = net.logits({"tokens": tokens[:, here], "position_ids": torch.arange(int(here.sum())).view(1, -1)})
            torch.testing.assert_close(packed[:, here], alone, rtol=0, atol=1e-6 if settings is LLAMA else 1e-12)


def test_padding_rows_start_at_zero_and_are_never_predicted() -> None:
    net = model({"tied_embeddings": False})
    assert net.embedding.weight.shape == (48, 24)
    assert not net.embedding.weight[37:].any() and not net.head.weight[37:].any()
    assert net.embedding.weight[:37].std() > 0.15
    net(batch()).backward()
    assert net.embedding.weight.grad is not None and not net.embedding.weight.grad[37:].any()


def test_output_projections_start_smaller_with_depth() -> None:
    net = GPT(ModelConfig(num_layers=8, hidden_size=64, num_heads=4, vocab_size=100, init_std=0.02))
    net.initialize(1)
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1 and not name.endswith("bias"):
            want = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02  # sqrt(2 * 8) = 4
            real = parameter[:100] if name == "embedding.weight" else parameter
            assert real.std().item() == pytest.approx(want, rel=0.05), name


def test_which_parameters_decay() -> None:
    for settings in (GPT2, LLAMA, BLOOM):
        for name, parameter in model(settings).named_parameters():
            matrix = name.endswith("weight") and "norm" not in name
            assert spec_of(parameter).weight_decay == matrix, name


# Published sizes.

LLAMA3_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_heads": 32,
    "kv_heads": 8,
    "ffn_hidden_size": 14336,
    "vocab_size": 128256,
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "tied_embeddings": False,
}
LLAMA2_7B = {
    **LLAMA3_8B,
    "kv_heads": 32,
    "ffn_hidden_size": 11008,
    "vocab_size": 32000,
}
GPT3_175B = {"num_layers": 96, "hidden_size": 12288, "num_heads": 96, "vocab_size": 50257, "max_positions": 2048}
BLOOM_176B = {
    "num_layers": 70,
    "hidden_size": 14336,
    "num_heads": 112,
    "vocab_size": 250880,
    "position": "alibi",
    "embedding_norm": True,
}


@pytest.mark.parametrize(
    "settings, published",
    [
        ({}, 124_439_808),  # GPT-2 small, as transformers counts it
        ({"num_layers": 24, "hidden_size": 1024, "num_heads": 16}, 354_823_168),
        (LLAMA3_8B, 8_030_261_248),
        (LLAMA2_7B, 6_738_415_616),
        (BLOOM_176B, 176_247_271_424),
        # Published as 175.0 B; exactly 12 L h^2 + 13 L h + (V + s + 2) h.
        (GPT3_175B, (12 * 96 * 12288 + 13 * 96 + 50257 + 2048 + 2) * 12288),
    ],
    ids=["gpt2", "gpt2-medium", "llama3-8b", "llama2-7b", "bloom-176b", "gpt3-175b"],
)
def test_number_of_parameters(settings: dict[str, Any], published: int) -> None:
    m = ModelConfig(**{**settings, "vocab_multiple": 1})
    assert sum(p.numel() for p in GPT(m, StageSettings(device="meta")).parameters()) == published


def test_costs_are_two_flops_a_weight_and_the_attention_square() -> None:
    m = ModelConfig(**LLAMA3_8B)
    s = 8192
    net = GPT(m, StageSettings(device="meta", span=StageSpan(0, 1)))
    matrices = sum(p.numel() for name, p in net.layers.named_parameters() if "norm" not in name)
    costs = layer_costs(m, s)
    assert costs.block == 2 * matrices + 4 * s * m.hidden_size
    assert costs.head == 2 * m.vocab_size * m.hidden_size
    run = from_dict(RunConfig, {"model": LLAMA3_8B, "train": {"sequence_length": s}}, "test")
    parts = GPTTask(run)
    assert parts.flops_per_token == 3 * (32 * costs.block + costs.head)
    assert parts.num_layers == 32


def test_split_by_cost_takes_layers_from_the_stage_with_the_head() -> None:
    run = from_dict(RunConfig, {"model": LLAMA3_8B}, "test")
    costs = GPTTask(run).costs
    split = split_layers(32, 8, costs.block, costs.embedding, costs.head, "cost")
    assert sum(split) == 32 and split[-1] < min(split[:-1])


def test_activation_shape_is_what_a_stage_returns() -> None:
    run = from_dict(
        RunConfig,
        {"model": config(**GPT2).model_dump(), "train": {"sequence_length": S, "micro_batch": B}},
        "test",
    )
    first = model(GPT2, span=StageSpan(0, 2, head=False))
    assert first(batch()).shape == GPTTask(run).activation_shape(Mesh.single(), batch()) == (S, B, 24)
    halves = with_tp(Axis("tp", 0, 2, None, (0, 1)))
    assert GPTTask(run).activation_shape(halves, batch()) == (S // 2, B, 24)


def test_a_later_stage_says_what_it_misses() -> None:
    with pytest.raises(AssertionError, match="needs the previous stage's output"):
        model(GPT2, span=StageSpan(2, 4, embedding=False))(batch())


def test_no_two_dropouts_of_the_model_make_the_same_decisions() -> None:
    """Every site has a number of its own: one of the embedding, three a block."""
    net = model({"hidden_dropout": 0.1, "attention_dropout": 0.1})
    sites: list[int] = []
    row_keys = DropoutKeys.row_keys

    def spy(keys: DropoutKeys, site: int, length: int, offset: int) -> Tensor:
        sites.append(site)
        return row_keys(keys, site, length, offset)

    with patch.object(DropoutKeys, "row_keys", spy):
        net(batch())
    assert len(sites) == len(set(sites)) == 1 + 3 * 4


def test_of_many_micro_batches_in_flight_one_holds_a_gradient_of_the_output_weights() -> None:
    """GPipe computes a loss when its backward pass begins: the numbers of 1F1B, bit for bit, with one such gradient."""
    found = []
    for name in ("1f1b", "gpipe"):
        net, mesh = model(LLAMA), Mesh.single()
        alive: list[weakref.ref[Tensor]] = []
        counts: list[int] = []

        def noted(total: Tensor, *operands: Any, alive: Any = alive, counts: Any = counts, **more: Any) -> None:
            if not any(seen() is total for seen in alive):
                alive.append(weakref.ref(total))
            counts.append(sum(seen() is not None for seen in alive))
            add_product(total, *operands, **more)

        executor = Executor(
            build_schedule(name, 1, 4),
            {0: net},
            pp=mesh.pp,
            pp_back=mesh.pp_back,
            activation_shape=None,
            dtype=torch.float64,
            device=mesh.device,
        )
        with patch("megatron_ds.layers.loss.add_product", noted):
            total = executor.run([batch()] * 4, torch.tensor(0.5, dtype=torch.float64))
        assert len(counts) >= 4 and max(counts) == 1, name
        found.append([total, *(p.grad for p in net.parameters())])
    for one, other in zip(*found):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_biases_and_masks_are_made_once_a_micro_batch(mode: Any) -> None:
    """ALiBi and documents, where attention takes them as a matrix: for four layers, recomputed ones included."""
    net = model(BLOOM, recompute=RecomputeConfig(mode=mode))
    with (
        patch.object(attention_cores, "is_preferred", lambda *_: False),
        patch.object(attention_cores, "_bias", wraps=attention_cores._bias) as bias,
    ):
        net(batch()).backward()
    assert bias.call_count == 1
