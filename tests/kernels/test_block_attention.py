"""Attention by blocks of queries against ``scaled_dot_product_attention`` and against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.alibi import Alibi
from megatron_ds.kernels.block_attention import Dropout, block_attention, block_size
from megatron_ds.kernels.documents import Documents
from megatron_ds.kernels.dropout import keep_mask


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return block_attention(q, k, v, causal=True)


def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, b, n, d = q.shape
    k, v = (t.repeat_interleave(n // t.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).reshape(s, b, n * d)


def projections(s: int, n: int, g: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The queries, keys and values of one projection, behind it: strided views, as a layer has them."""
    generator = torch.Generator().manual_seed(s * 100 + n)
    fused = torch.randn(s, 3, g, n // g + 2, d, generator=generator, dtype=torch.float64, requires_grad=True)
    q, k, v = fused.split([n // g, 1, 1], dim=-2)
    return fused, q.reshape(s, 3, n, d), k.squeeze(-2), v.squeeze(-2)


def assert_equal(got: Tensor, want: Tensor, fused: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = [torch.autograd.grad(out, fused, seed, retain_graph=True)[0] for out in (got, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


# Lengths on both sides of a block of 64 and of what is kept for the backward pass (4 d).
@pytest.mark.parametrize("s", [1, 7, 63, 64, 65, 130])
@pytest.mark.parametrize(("n", "g", "d"), [(2, 2, 8), (6, 2, 8), (4, 1, 40)])
def test_output_and_gradients_in_float64(s: int, n: int, g: int, d: int) -> None:
    fused, q, k, v = projections(s, n, g, d)
    assert_equal(causal_attention(q, k, v), expected(q, k, v), fused)


def by_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    ids: Tensor | None,
    alibi: Alibi | None,
    dropout: Dropout | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The definition: whole score matrices ``[b, n, s, s]``, each rule written out."""
    s, b, n, d = q.shape
    k, v = (t.repeat_interleave(n // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / d**0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    places = torch.arange(s)
    seen = torch.ones(b, 1, s, s, dtype=torch.bool)
    if window is not None:
        seen = seen & ((places - places.unsqueeze(1)).abs() < window)
    if causal:
        seen = seen & (places <= places.unsqueeze(1))
    if ids is not None:
        seen = seen & (ids.unsqueeze(2) == ids.unsqueeze(1)).unsqueeze(1)
    if alibi is not None:
        by_place = [[float(slope * place) for place in range(s)] for slope in alibi.slopes.double()]
        if alibi.rounded is not None:
            by_place = [[float(slope.bfloat16() * torch.tensor(i)) for i in range(s)] for slope in alibi.slopes]
        table = torch.tensor(by_place, dtype=torch.float64) * (alibi.rounded or 1.0)
        scores = scores + table.unsqueeze(1)
    probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    if dropout is not None:
        columns = places + s * (dropout.first_head + torch.arange(n)).unsqueeze(1)
        kept = torch.stack([keep_mask(dropout.row_keys.t(), head, dropout.p) for head in columns], 1)
        probabilities = probabilities * kept / (1 - dropout.p)
    return torch.einsum("bnst,tbnd->sbnd", probabilities, v).reshape(s, b, n * d)


@pytest.mark.parametrize("rule", ["documents", "alibi", "rounded alibi", "dropout", "window", "softcap", "all"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize(("s", "n", "g", "d"), [(30, 2, 2, 8), (130, 6, 2, 8), (130, 4, 4, 40)])
def test_rules_in_float64(s: int, n: int, g: int, d: int, causal: bool, rule: str) -> None:
    generator = torch.Generator().manual_seed(s + n)
    ids = (torch.rand(3, s, generator=generator) < 0.04).cumsum(1)
    ids[1] = 0  # a sample that is one document
    ids[2, 64:] += 1  # and one with a boundary between two blocks
    slopes = 2.0 ** (-0.3 * torch.arange(1.0, n + 1))
    dropout = Dropout(0.3, torch.randint(2**31, (s, 3), generator=generator).to(torch.int32), 5)
    given: dict[str, Any] = {
        "ids": ids if rule in ("documents", "all") else None,
        "alibi": Alibi(slopes, 0.3 if "rounded" in rule else None) if "alibi" in rule or rule == "all" else None,
        "dropout": dropout if rule in ("dropout", "all") else None,
        "window": 20 if rule in ("window", "all") else None,
        "softcap": 0.7 if rule in ("softcap", "all") else None,
    }
    fused, q, k, v = projections(s, n, g, d)
    want = by_scores(q, k, v, causal, **given)
    ids_given = given.pop("ids")
    documents = None if ids_given is None else Documents.of_ids(ids_given)
    assert_equal(block_attention(q, k, v, causal=causal, documents=documents, **given), want, fused)


def test_the_bounds_of_documents() -> None:
    documents = Documents.of_ids(torch.tensor([[0, 0, 0, 0], [3, 3, 1, 1], [0, 1, 1, 2], [5, 5, 0, 5]]))
    assert documents.starts.tolist() == [[0, 0, 0, 0], [0, 0, 2, 2], [0, 1, 1, 3], [0, 0, 2, 3]]
    assert documents.ends.tolist() == [[4, 4, 4, 4], [2, 2, 4, 4], [1, 3, 3, 4], [2, 2, 3, 4]]
    assert documents.same()[1, 0].tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2


def test_keys_that_are_not_seen_are_not_multiplied() -> None:
    """FLOPs counted by torch: 8 documents of 64 tokens have 1 / 4.5 of the causal ones of 512, and a window that
    reaches one block back multiplies two blocks of keys a block of queries, but for the first."""
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.randn(512, 2, 2, 8, requires_grad=True)
    one, eight = (Documents.of_ids((torch.arange(512) // size).expand(2, -1)) for size in (512, 64))
    blocks = 512 // block_size(q.device)
    counted = []
    for documents, window in ((one, None), (eight, None), (one, block_size(q.device) + 1)):
        with FlopCounterMode(display=False) as counter:
            block_attention(q, q, q, causal=True, documents=documents, window=window).sum().backward()
        counted.append(counter.get_total_flops())
    everything = blocks * (blocks + 1) / 2
    assert counted[0] / counted[1] == pytest.approx(everything / blocks)
    assert counted[0] / counted[2] == pytest.approx(everything / (2 * blocks - 1))


@pytest.mark.parametrize("rule", ["documents", "alibi", "dropout", "window", "softcap"])
def test_memory_does_not_grow_with_the_square_of_the_sequence(rule: str) -> None:
    """What autograd keeps of four times the tokens is four times as much."""
    kept = {}
    for s in (256, 1024):
        ids = (torch.arange(s) // 100).expand(1, -1)
        given: dict[str, Any] = {
            "documents": {"documents": Documents.of_ids(ids)},
            "alibi": {"alibi": Alibi(torch.ones(2))},
            "dropout": {"dropout": Dropout(0.1, torch.zeros(s, 1, dtype=torch.int32))},
            "window": {"window": 100},
            "softcap": {"softcap": 5.0},
        }[rule]
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        q = torch.randn(s, 1, 2, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block_attention(q, q, q, causal=True, **given)
        kept[s] = sum(sizes)
    assert kept[1024] == 4 * kept[256] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_the_truth_as_torch_is(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(150, 2, 3, 32, generator=generator).to(dtype) for _ in range(3))
    truth = expected(q.double(), k.double(), v.double())
    ours = (causal_attention(q, k, v).double() - truth).abs().max()
    torchs = (expected(q, k, v).double() - truth).abs().max()
    # Scores are rounded before the softmax here and not there: at most one more rounding of the dtype.
    assert ours <= torchs + torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("s", [70, 300])  # probabilities kept, and computed again
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_beyond_the_range_of_fp16(s: int, dtype: torch.dtype) -> None:
    """64 products of 100 x 100 come to 80,000 after the scale; fp16 ends at 65,504."""
    q = torch.full((s, 1, 1, 64), 100.0, dtype=dtype, requires_grad=True)
    v = torch.linspace(0.0, 1.0, s).view(s, 1, 1, 1).expand(s, 1, 1, 64).to(dtype).requires_grad_()
    got, want = (function(q, q, v) for function in (causal_attention, expected))
    torch.testing.assert_close(got, want, rtol=0, atol=4 * torch.finfo(dtype).eps)
    got_q, got_v = torch.autograd.grad(got.float().sum(), (q, v))
    (want_v,) = torch.autograd.grad(expected(q.double(), q.double(), v.double()).sum(), v)
    assert got_q.isfinite().all()
    torch.testing.assert_close(got_v, want_v, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_gradients_of_keys_are_summed_in_fp32() -> None:
    """Over 80 blocks of queries that all attend to the first key alike."""
    s, d = 5120, 8
    q = torch.zeros(s, 1, 1, d)
    q[..., 0] = 16.0
    k = torch.full((s, 1, 1, d), -16.0)
    k[0] = 16.0
    q, k = q.bfloat16(), k.bfloat16()
    v = torch.zeros(s, 1, 1, d).bfloat16().requires_grad_()
    (got,) = torch.autograd.grad(causal_attention(q, k, v), v, torch.full((s, 1, d), 0.01).bfloat16())
    assert abs(got[0].double().mean().item() / (s * 0.01) - 1) < 0.01


def test_the_future_does_not_reach_an_output() -> None:
    q, k, v = (torch.randn(100, 1, 2, 8, generator=torch.Generator().manual_seed(1)) for _ in range(3))
    before = causal_attention(q, k, v)
    for later in (1, 63, 64, 99):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[later:] += 1.0
        changed_v[later:] -= 1.0
        assert torch.equal(causal_attention(q, changed_k, changed_v)[:later], before[:later])


def test_a_batch_of_nothing() -> None:
    q = torch.randn(70, 0, 2, 8, requires_grad=True)
    out = causal_attention(q, q, q)
    assert out.shape == (70, 0, 16) and torch.autograd.grad(out.sum(), q)[0].shape == q.shape
