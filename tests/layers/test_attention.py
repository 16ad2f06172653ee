"""Self-attention of one process against a loop over samples, documents, heads and queries."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.kernels.alibi import Alibi
from megatron_ds.kernels.documents import Documents
from megatron_ds.kernels.varlen_attention import takes_varlen
from megatron_ds.layers.attention import AttentionConfig, AttentionInputs, SelfAttention
from megatron_ds.layers.attention_cores import (
    AttentionCore,
    AttentionRules,
    BlockCore,
    FusedCore,
    VarlenCore,
    _bias,
    make_core,
)
from megatron_ds.layers.position import Rotary, alibi_slopes, rotary_table
from megatron_ds.mesh import Axis
from megatron_ds.rng import DropoutKeys, initialize_parameters, keep_mask

S, B, H, D = 7, 3, 12, 4
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])  # [b, s]


def attention(groups: int = 2, queries: int = 2, seed: int = 1, **settings: Any) -> SelfAttention:
    recompute, dtype = settings.pop("recompute_core", False), settings.pop("dtype", torch.float64)
    sizes = {"bias": True, "qkv_bias": True, "qk_norm": None, "norm_eps": 1e-5, "init_std": 0.4, "out_std": 0.4}
    config = AttentionConfig(H, groups, queries, D, **{**sizes, **settings})
    layer = SelfAttention(
        "attention", config, site=3, recompute_core=recompute, tp=Axis("tp"), sequence_parallel=False, dtype=dtype
    )
    initialize_parameters(layer.parameters(), seed)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return layer


def inputs(positions: Tensor, core: AttentionCore, rope: bool = False) -> AttentionInputs:
    rotary = rotary_table(positions, Rotary(D, 100.0).frequencies(), torch.float64) if rope else None
    return AttentionInputs(positions, core, rotary)


def rules(documents: bool = False, alibi: int = 0, dropout: float = 0.0, **settings: Any) -> AttentionRules:
    """``alibi``: number of heads; 0: none."""
    return AttentionRules(
        documents=Documents.of_ids(DOCUMENTS) if documents else None,
        alibi=Alibi(alibi_slopes(alibi)) if alibi else None,
        dropout=dropout,
        **{"keys": DropoutKeys(9, torch.arange(B)), **settings},
    )


def fused(rules: AttentionRules, dtype: torch.dtype = torch.float64) -> FusedCore:
    """What a GPU would take."""
    core = FusedCore(rules.causal, None if rules.only_causal else _bias(rules, S, torch.device("cpu"), dtype))
    assert rules.only_causal or core.bias is not None
    return core


def varlen(rules: AttentionRules) -> AttentionCore:
    """What a GPU takes in half precision; here by the reference."""
    if rules.alibi is not None or rules.drops:
        pytest.skip("sequences of various lengths know no ALiBi and no dropout: another core is made")
    return VarlenCore(rules.causal, rules.window, rules.documents)


CORES = {"blocks": BlockCore, "fused": fused, "varlen": varlen}


def loop(layer: SelfAttention, x: Tensor, positions: Tensor, documents: Tensor, alibi: bool, rope: bool) -> Tensor:
    """``x [s, b, h]`` -> ``[s, b, h]``: every query by itself, over the earlier tokens of its document."""
    groups, per_group = layer.qkv.weight.shape[0], layer.qkv.weight.shape[1] - 2
    slopes = alibi_slopes(groups * per_group)
    assert layer.qkv.bias is not None and layer.out.bias is not None

    def project(sample: int, token: int, group: int, which: int) -> Tensor:
        return layer.qkv.weight[group, which] @ x[token, sample] + layer.qkv.bias[group, which]

    def prepare(vector: Tensor, norm: Any, position: int) -> Tensor:
        if norm is not None:
            vector = vector / (vector.square().mean() + 1e-5).sqrt() * norm.weight
        if rope:
            angles = position * Rotary(D, 100.0).frequencies()
            turned = torch.complex(vector[: D // 2], vector[D // 2 :]) * torch.polar(torch.ones(D // 2), angles)
            vector = torch.cat((turned.real, turned.imag)).double()
        return vector

    result = torch.zeros(S, B, H, dtype=torch.float64)
    for sample, query in product(range(B), range(S)):
        heads = []
        for head in range(groups * per_group):
            group = head // per_group
            q = prepare(project(sample, query, group, head % per_group), layer.q_norm, int(positions[query, sample]))
            seen = [t for t in range(query + 1) if documents[sample, t] == documents[sample, query]]
            scores = []
            for t in seen:
                k = prepare(project(sample, t, group, per_group), layer.k_norm, int(positions[t, sample]))
                score = q @ k / math.sqrt(D)
                if alibi:
                    score = score - slopes[head] * (positions[query, sample] - positions[t, sample])
                scores.append(score)
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(w * project(sample, t, group, per_group + 1) for w, t in zip(weights, seen)))
        result[query, sample] = layer.out.weight @ torch.cat(heads) + layer.out.bias
    return result


def activations(seed: int = 5) -> Tensor:
    return torch.randn(S, B, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positions_of(documents: bool) -> Tensor:
    """``[s, b]``; with documents each starts at 0."""
    if not documents:
        return torch.arange(S).unsqueeze(1).expand(S, B)
    rows = [[sum(1 for u in row[:t] if u == row[t]) for t in range(S)] for row in DOCUMENTS.tolist()]
    return torch.tensor(rows).t()


@pytest.mark.parametrize("groups, queries", [(3, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("kind", ["none", "rope", "alibi", "qk_norm"])
@pytest.mark.parametrize("core", CORES)
def test_equals_a_loop(core: str, kind: str, documents: bool, groups: int, queries: int) -> None:
    layer = attention(groups, queries, qk_norm="head" if kind == "qk_norm" else None)
    x, positions = activations(), positions_of(documents)
    rope = kind in ("rope", "qk_norm")
    what = rules(documents, groups * queries if kind == "alibi" else 0)
    got = layer(x, inputs(positions, CORES[core](what), rope))
    ids = DOCUMENTS if documents else torch.zeros(B, S, dtype=torch.long)
    want = loop(layer, x, positions, ids, kind == "alibi", rope)
    # Rotary angles are fp32.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if rope else 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("alibi", [0, 4])
@pytest.mark.parametrize("core", CORES)
def test_no_gradient_from_the_future_or_another_document(core: str, alibi: int, dropout: float) -> None:
    if dropout and core == "fused":
        assert isinstance(make_core(rules(True, alibi, dropout), S, D, torch.device("cuda"), torch.float32), BlockCore)
        return
    x = activations().requires_grad_()
    out = attention()(x, inputs(positions_of(True), CORES[core](rules(True, alibi, dropout))))
    for sample, query in product(range(B), range(S)):
        (grad,) = torch.autograd.grad(out[query, sample].sum(), x, retain_graph=True)
        reached = grad.abs().sum(-1)  # [s, b]
        for token, other in product(range(S), range(B)):
            allowed = other == sample and token <= query and DOCUMENTS[sample, token] == DOCUMENTS[sample, query]
            if not allowed:
                assert reached[token, other] == 0.0
        assert reached[query, sample] > 0


def test_dropout_of_probabilities_is_keys_and_scale() -> None:
    """With values that are one-hot in the key, the output shows the dropped probabilities themselves."""
    s, p = 4, 0.4
    q = torch.zeros(s, 1, 1, s, dtype=torch.float64)  # equal scores: probabilities 1 / (t + 1)
    v = torch.eye(s, dtype=torch.float64).view(s, 1, 1, s)
    out = []
    for sample in range(400):
        core = BlockCore(AttentionRules(dropout=p, keys=DropoutKeys(1, torch.tensor([sample]))))
        out.append(core.attend(q, q, v, 3).view(s, s))
    seen = torch.stack(out)
    for query, key in product(range(s), range(s)):
        values = seen[:, query, key].unique()
        if key > query:
            assert values.tolist() == [0.0]
        else:
            assert values.tolist() == pytest.approx([0.0, 1 / (query + 1) / (1 - p)])
    kept = (seen > 0).double().mean(0)[torch.ones(s, s).tril().bool()]
    assert ((kept - (1 - p)).abs() < 4 * math.sqrt(p * (1 - p) / 400)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_that_fp16_cannot_hold(dtype: torch.dtype) -> None:
    """64 products of 100 x 100: 640,000, and 80,000 after the scale; fp16 ends at 65,504."""
    s, d = 6, 64
    core = BlockCore(AttentionRules(dropout=0.3, keys=DropoutKeys(1, torch.arange(1))))
    q = torch.full((s, 1, 1, d), 100.0, dtype=dtype, requires_grad=True)
    v = torch.linspace(0.0, 1.0, s * d).view(s, 1, 1, d)
    results = []
    for given in ((q, q, v.to(dtype)), (q.double(), q.double(), v.to(dtype).double())):
        out = core.attend(*given)
        (gradient,) = torch.autograd.grad(out.double().sum(), q)
        results.append((out.double(), gradient.isfinite().all()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert results[0][1]


def test_without_dropout_keys_nothing_is_dropped() -> None:
    layer, x = attention(), activations()
    outs = [layer(x, inputs(positions_of(False), BlockCore(r))) for r in (rules(dropout=0.5, keys=None), rules())]
    assert torch.equal(*outs)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_bits(dropout: float) -> None:
    results = []
    for recompute in (False, True):
        layer = attention(recompute_core=recompute)
        x = activations().requires_grad_()
        core = BlockCore(rules(True, dropout=dropout))
        layer(x, inputs(positions_of(True), core, True)).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*results))


def test_recomputation_frees_the_scores() -> None:
    """What is kept for the backward pass holds no ``[s, s]`` tensor."""
    sizes = {}
    for recompute in (False, True):
        layer, kept = attention(recompute_core=recompute), []

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(activations(), inputs(positions_of(False), BlockCore(rules(dropout=0.1))))
        sizes[recompute] = sum(tuple(tensor.shape[-1:]) == (S,) for tensor in kept)
    assert sizes[False] > 0 and sizes[True] == 0


def test_dropout_decisions_are_keyed_by_global_head_and_key() -> None:
    """Heads share no decision, and a rank that holds the last heads makes theirs."""
    s, b, p, site = 5, 2, 0.4, 3
    keys = DropoutKeys(1, torch.tensor([7, 8]))
    v = torch.eye(s, dtype=torch.float64).view(s, 1, 1, s).expand(s, b, 2, s)
    for first_head in (0, 2):
        core = BlockCore(AttentionRules(dropout=p, keys=keys, first_head=first_head))
        got = core.attend(torch.zeros_like(v), torch.zeros_like(v), v, site)
        for query, sample, head, key in product(range(s), range(b), range(2), range(s)):
            row = keys.row_keys(site, 1, query)[0, sample]
            kept = key <= query and keep_mask(row, torch.tensor([(first_head + head) * s + key]), p).item()
            assert (got.view(s, b, 2, s)[query, sample, head, key] != 0).item() == kept


@pytest.mark.parametrize("settings", [{}, {"alibi": 4}, {"dropout": 0.3}, {"qk_norm": "head"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_batch_of_nothing(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    layer = attention(qk_norm=settings.get("qk_norm"), dtype=dtype)
    x = torch.empty(S, 0, H, dtype=dtype, requires_grad=True)
    what = rules(**{k: v for k, v in settings.items() if k != "qk_norm"}, keys=DropoutKeys(1, torch.arange(0)))
    out = layer(x, AttentionInputs(torch.empty(S, 0), make_core(what, S, D, torch.device("cpu"), dtype)))
    assert out.shape == x.shape
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_which_core_is_made() -> None:
    """On a CPU blocks of queries, but for long rows in fp32; on a GPU they serve dropout alone."""
    cpu, gpu, fp32, bf16 = torch.device("cpu"), torch.device("cuda"), torch.float32, torch.bfloat16
    plain, dropping = rules(), rules(dropout=0.1)
    documents = AttentionRules(documents=Documents.of_ids(torch.zeros(1, 1024, dtype=torch.int64)))
    assert isinstance(make_core(plain, 256, 64, cpu, fp32), BlockCore)
    assert isinstance(make_core(plain, 1024, 64, cpu, fp32), FusedCore)
    assert isinstance(make_core(plain, 1024, 64, cpu, bf16), BlockCore)
    assert isinstance(make_core(rules(causal=False), 256, 64, cpu, fp32), FusedCore)
    assert isinstance(make_core(documents, 1024, 64, cpu, fp32), BlockCore)
    assert isinstance(make_core(dropping, 1024, 64, gpu, bf16), BlockCore)
    assert make_core(plain, 256, 64, gpu, bf16) == FusedCore(causal=True)
    assert isinstance(make_core(rules(window=5), 256, 64, gpu, bf16), VarlenCore)
    assert make_core(rules(window=300), 256, 64, gpu, bf16) == FusedCore(causal=True), "all is within the window"
    assert isinstance(make_core(rules(window=5, softcap=3.0), 256, 64, gpu, bf16), BlockCore)
    for cut, others, head_dim, half in ((True, True, 64, True), (True, False, 64, False), (True, False, 63, True)):
        assert not takes_varlen(True, half, head_dim, cut, others)
