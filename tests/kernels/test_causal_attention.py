"""The CPU's causal attention against ``scaled_dot_product_attention`` and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.causal_attention import causal_attention, is_faster


def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, b, n, d = q.shape
    k, v = (t.repeat_interleave(n // t.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).reshape(s, b, n * d)


# Lengths on both sides of a block of 64 and of what is kept for the backward pass (4 d).
@pytest.mark.parametrize("s", [1, 7, 63, 64, 65, 130])
@pytest.mark.parametrize(("n", "g", "d"), [(2, 2, 8), (6, 2, 8), (4, 1, 40)])
def test_output_and_gradients_in_float64(s: int, n: int, g: int, d: int) -> None:
    generator = torch.Generator().manual_seed(s * 100 + n)
    # The queries, keys and values of one projection: strided views, as a layer has them.
    fused = torch.randn(s, 3, g, n // g + 2, d, generator=generator, dtype=torch.float64, requires_grad=True)
    q, k, v = fused.split([n // g, 1, 1], dim=-2)
    q, k, v = q.reshape(s, 3, n, d), k.squeeze(-2), v.squeeze(-2)
    seed = torch.randn(s, 3, n * d, generator=generator, dtype=torch.float64)
    got, want = causal_attention(q, k, v), expected(q, k, v)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    (got_grad,) = torch.autograd.grad(got, fused, seed, retain_graph=True)
    (want_grad,) = torch.autograd.grad(want, fused, seed)
    torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=1e-12)


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


def test_it_is_chosen_where_it_was_measured_to_be_faster() -> None:
    assert is_faster(torch.empty(256, 1, 1, 64))
    assert not is_faster(torch.empty(1024, 1, 1, 64))
    assert is_faster(torch.empty(1024, 1, 1, 64, dtype=torch.bfloat16))


def test_a_batch_of_nothing() -> None:
    q = torch.randn(70, 0, 2, 8, requires_grad=True)
    out = causal_attention(q, q, q)
    assert out.shape == (70, 0, 16) and torch.autograd.grad(out.sum(), q)[0].shape == q.shape
