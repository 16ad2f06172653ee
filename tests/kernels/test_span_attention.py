"""Attention of a text's last tokens against a plain loop over heads, and in half precision against float64."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels import span_attention as span_attention_kernel
from megatron_ds.kernels.alibi import Alibi
from megatron_ds.kernels.span_attention import span_attention, span_bias


def expected(q: Tensor, k: Tensor, v: Tensor, starts: list[int], rules: tuple[int | None, Alibi | None, float | None]):
    window, alibi, softcap = rules
    out = torch.empty_like(q)
    for text, start in enumerate(starts):
        for row in range(q.shape[1]):
            own = start + row
            seen = torch.arange(max(0, own - window + 1) if window else 0, own + 1)
            for head in range(q.shape[2]):
                group = head * k.shape[0] // q.shape[2]
                scores = k[group, text, seen] @ q[text, row, head] / math.sqrt(q.shape[3])
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                if alibi is not None:
                    scores = scores + alibi.slopes[head] * (seen - own)
                out[text, row, head] = scores.softmax(0) @ v[group, text, seen]
    return out


@pytest.mark.parametrize("starts, count", [([12], 1), ([0, 20, 3], 1), ([0], 130), ([7], 70), ([21], 5)])
@pytest.mark.parametrize("rules", [(None, None, None), (9, None, None), (None, "alibi", 2.0)])
def test_rows_see_their_own_text(
    starts: list[int], count: int, rules: tuple[int | None, str | None, float | None]
) -> None:
    generator = torch.Generator().manual_seed(count)
    n, g, d, length = 6, 2, 8, max(starts) + count

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(len(starts), count, n, d), *(normal(length, len(starts), g, d).transpose(0, 2) for _ in range(2))
    window, kind, softcap = rules
    alibi = None if kind is None else Alibi(torch.rand(n, generator=generator, dtype=torch.float64))
    queries = torch.tensor(starts).unsqueeze(1) + torch.arange(count)
    bias = span_bias(queries, torch.arange(length).expand(len(starts), -1), torch.float64, window, alibi)
    want = expected(q, k, v, starts, (window, alibi, softcap))
    for whole in (0, span_attention_kernel._WHOLE):  # in blocks of queries, and where there are so few, in one
        with mock.patch.object(span_attention_kernel, "_WHOLE", whole):
            torch.testing.assert_close(span_attention(q, k, v, bias, softcap), want, rtol=0, atol=1e-12)
    for dtype, tolerance in ((torch.bfloat16, 4e-2), (torch.float16, 4e-3)):
        half = span_attention(q.to(dtype), k.to(dtype), v.to(dtype), bias.to(dtype), softcap)
        torch.testing.assert_close(half.double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("texts, count", [(4, 1), (1, 70)])
@pytest.mark.parametrize("largest", [3.0, 8.0, 60.0])
def test_sharp_scores_are_as_exact_in_bf16_as_of_torch(texts: int, count: int, largest: float) -> None:
    """Its fused kernel keeps scores in fp32. Rounded to bf16, those of 60 give outputs with 16 times its error."""
    generator = torch.Generator().manual_seed(3)
    shapes = (texts, count, 6, 32), (2, texts, 1000, 32), (2, texts, 1000, 32)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    scores = torch.einsum("bcgrd,gbld->bgrcl", q.unflatten(2, (2, 3)), k) / math.sqrt(32)
    q, k, v = (x.bfloat16() for x in (q * largest / scores.abs().max(), k, v))
    bias = span_bias(torch.arange(1000 - count, 1000).expand(texts, -1), torch.arange(1000).expand(texts, -1), q.dtype)

    def fused(dtype: torch.dtype) -> Tensor:
        own = (x.to(dtype) for x in (q.transpose(1, 2), k.transpose(0, 1), v.transpose(0, 1)))
        return F.scaled_dot_product_attention(*own, attn_mask=bias.to(dtype), enable_gqa=True).transpose(1, 2).double()

    want = fused(torch.float64)
    error, of_torch = ((x - want).norm() for x in (span_attention(q, k, v, bias).double(), fused(torch.bfloat16)))
    assert error < 2.0 * of_torch
