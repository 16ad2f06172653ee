"""The references, which say what the ops mean: against torch's own, closed forms and float64 differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.activation import bias_gelu, gated
from megatron_ds.kernels.cross_entropy import LossTerms, logit_gradient, token_statistics
from megatron_ds.kernels.dropout import dropout_add, keep_mask
from megatron_ds.kernels.norm import add_norm, layer_norm, rms_norm
from megatron_ds.kernels.rotary import rotary
from megatron_ds.kernels.softmax import scaled_masked_softmax
from megatron_ds.kernels.square_sum import square_sum


def exact(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def with_gradient(*shape: int) -> Tensor:
    return exact(*shape).requires_grad_()


def row_keys(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def test_gradients_by_differences() -> None:
    keys, x, y, w, b = (
        row_keys(2, 2),
        with_gradient(2, 2, 6),
        with_gradient(2, 2, 6),
        with_gradient(6),
        with_gradient(6),
    )
    functions = [
        (lambda x, w, b: layer_norm(x, w, b, 1e-5), (x, w, b)),
        (lambda x, w: rms_norm(x, w, 1e-5), (x, w)),
        (lambda x, y, w, b: add_norm(x, y, w, b, 1e-5, p=0.3, row_keys=keys), (x, y, w, b)),
        (lambda x, y, w: add_norm(x, y, w, None, 1e-5, kind="rmsnorm"), (x, y, w)),
        (lambda x, y: dropout_add(x, y, 0.3, keys), (x, y)),
        (lambda x: gated(x, "gelu_tanh"), (x,)),
        (lambda x, b: bias_gelu(x, b), (x, b)),
        (lambda x: scaled_masked_softmax(x.unsqueeze(0), 0.3, causal=True, slopes=exact(2)), (x,)),
        (lambda x, y: rotary(x.unsqueeze(2), y.unsqueeze(2), *table(2, 2, 6)), (x, y)),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs)


def test_norms_from_their_definitions() -> None:
    x, w, b = exact(3, 5, 16), exact(16), exact(16)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    torch.testing.assert_close(layer_norm(x, w, b, 1e-3), (x - mean) / (var + 1e-3).sqrt() * w + b)
    torch.testing.assert_close(rms_norm(x, w, 1e-3), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_add_norm_is_its_three_parts(kind: str) -> None:
    x, r, w = exact(3, 2, 16), exact(3, 2, 16), exact(16)
    b, keys = (exact(16), row_keys(3, 2)) if kind == "layernorm" else (None, row_keys(3, 2))
    kept = keep_mask(keys, torch.arange(16), 0.25)
    assert 0 < kept.sum() < kept.numel()
    want = r + torch.where(kept, x / 0.75, 0.0)
    y, summed = add_norm(x, r, w, b, 1e-5, kind=kind, p=0.25, row_keys=keys)
    torch.testing.assert_close(summed, want)
    normed = F.layer_norm(want, (16,), w, b, 1e-5) if b is not None else F.rms_norm(want, (16,), w, 1e-5)
    torch.testing.assert_close(y, normed)
    assert torch.equal(add_norm(x, r, w, b, 1e-5, kind=kind, p=0.25)[1], r + x), "without keys nothing is dropped"


def test_dropout_keeps_as_many_as_it_should_and_scales_them() -> None:
    ones, keys = torch.ones(200, 500), row_keys(200)
    for p in (0.1, 0.5, 0.9):
        out = dropout_add(ones, None, p, keys)
        kept = (out != 0).double().mean().item()
        assert abs(kept - (1 - p)) < 5 * math.sqrt(p * (1 - p) / out.numel())
        assert out[out != 0].unique().tolist() == pytest.approx([1 / (1 - p)])
        rows, columns = (out != 0).double().mean(1), (out != 0).double().mean(0)
        assert rows.std() < 1.5 * math.sqrt(p * (1 - p) / 500) and columns.std() < 1.5 * math.sqrt(p * (1 - p) / 200)
    assert dropout_add(ones, None, 0.0, keys) is ones and dropout_add(ones, None, 0.5, None) is ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_squares_are_of_all_elements(dtype: torch.dtype) -> None:
    """Of fewer than a row, whole rows, and a rest behind them."""
    for n in (0, 1, 4095, 4096, 4097, 3 * 4096 + 5):
        flat = exact(n).to(dtype)
        want = flat.double().square().sum()
        found = square_sum(flat)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, want, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)


def test_activations_are_torchs() -> None:
    x, b = exact(3, 16), exact(16)
    gate, up = x[:, :8], x[:, 8:]
    torch.testing.assert_close(gated(x), gate * torch.sigmoid(gate) * up)
    torch.testing.assert_close(gated(x, "gelu"), gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up)
    torch.testing.assert_close(gated(x, "gelu_tanh"), F.gelu(gate, approximate="tanh") * up)
    torch.testing.assert_close(bias_gelu(x, b, "tanh"), F.gelu(x + b, approximate="tanh"))
    torch.testing.assert_close(bias_gelu(x, None), F.gelu(x))


def test_softmax_against_torch_with_the_mask_written_out() -> None:
    x, slopes = exact(2, 3, 4, 7), exact(3)
    padding = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool).view(2, 1, 1, 7)
    bias = torch.zeros(2, 3, 4, 7, dtype=torch.float64)
    for b in range(2):
        for n in range(3):
            for query in range(4):
                for key in range(7):
                    place = query + 3  # the last of 4 queries is the last of 7 keys
                    visible = key <= place and padding[b, 0, 0, key]
                    bias[b, n, query, key] = slopes[n] * (key - place) if visible else -math.inf
    got = scaled_masked_softmax(x, 0.7, causal=True, mask=padding, slopes=slopes)
    torch.testing.assert_close(got, (x * 0.7 + bias).softmax(-1))
    torch.testing.assert_close(scaled_masked_softmax(x), x.softmax(-1))


def test_softmax_of_a_row_that_sees_nothing_is_zero_and_passes_nothing() -> None:
    x = with_gradient(1, 1, 5, 3)  # five queries, three keys: the first two precede every key
    out = scaled_masked_softmax(x, causal=True)
    out.square().sum().backward()
    assert not out[0, 0, :2].any() and torch.equal(out[0, 0, 2].detach(), torch.tensor([1.0, 0.0, 0.0]).double())
    assert x.grad is not None and x.grad.isfinite().all() and not x.grad[0, 0, :2].any()
    assert scaled_masked_softmax(torch.full((1, 1, 1, 4), 6e4, dtype=torch.float16), 100.0).tolist() == [[[[0.25] * 4]]]


def test_softmax_of_the_lowest_scores() -> None:
    """Hidden keys take no part, even where the visible scores are the lowest numbers there are."""
    lowest = torch.finfo(torch.float32).min
    x = torch.tensor([[lowest, lowest, 5.0, 6.0], [lowest, -math.inf, 0.0, 0.0]]).view(1, 1, 2, 4)
    mask = torch.tensor([[True, True, False, False], [True, True, False, False]])
    assert scaled_masked_softmax(x, mask=mask).tolist() == [[[[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]]]


def test_cross_entropy_of_a_rank_without_a_finite_logit() -> None:
    logits = exact(2, 12)
    logits[0, :5] = logits[1, 5:] = -math.inf
    target, mask = torch.tensor([7, 2]), torch.ones(2, dtype=torch.bool)
    parts = [(logits[:, :5].clone(), target), (logits[:, 5:].clone(), target - 5)]
    results = [token_statistics(part, local, want_sum=False) for part, local in parts]
    stats = torch.stack([stats for stats, _ in results])
    assert stats[0, 1, 0] == 0.0 == stats[1, 1, 1]
    lse = logits.logsumexp(1)
    terms = LossTerms(0.0, 0.0, vocab_size=12)
    gradients = [
        logit_gradient(scratch, own[0], lse, local, mask, None, terms)
        for (own, scratch), (_, local) in zip(results, parts)
    ]
    want = logits.softmax(1) - F.one_hot(target, 12)
    torch.testing.assert_close(torch.cat(gradients, dim=1), want)


def table(length: int, batch: int, size: int) -> tuple[Tensor, Tensor]:
    angles = exact(length, batch, 1, size // 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_multiplication_by_complex_numbers(interleaved: bool) -> None:
    q, k = exact(3, 2, 4, 10), exact(3, 2, 1, 10)
    cos, sin = table(5, 2, 6)
    turn = torch.complex(cos[2:, ..., :3], sin[2:, ..., :3])
    for x, got in zip((q, k), rotary(q, k, cos, sin, interleaved=interleaved, offset=2)):
        parts = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., :3], x[..., 3:6])
        z = torch.complex(*(p.contiguous() for p in parts)) * turn
        again = torch.stack((z.real, z.imag), dim=-1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
        torch.testing.assert_close(got, torch.cat((again, x[..., 6:]), dim=-1))


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.02)])
def test_cross_entropy_of_a_vocabulary_in_two_parts(smoothing: float, z_loss: float) -> None:
    logits, target = with_gradient(6, 20), torch.tensor([0, 19, 7, 12, 5, 3])
    mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)
    losses = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    (losses + z_loss * logits.logsumexp(1).square())[mask].sum().backward()
    parts = [(logits.detach()[:, :12].clone(), target), (logits.detach()[:, 12:].clone(), target - 12)]
    results = [token_statistics(part, local, want_sum=bool(smoothing)) for part, local in parts]
    stats = torch.stack([stats for stats, _ in results])
    lse = (stats[:, 0] + stats[:, 1].log()).logsumexp(0)
    torch.testing.assert_close(lse, logits.detach().logsumexp(1))
    torch.testing.assert_close(stats[:, 2].sum(0), logits.detach().gather(1, target.unsqueeze(1)).squeeze(1))
    if smoothing:
        torch.testing.assert_close(stats[:, 3].sum(0), logits.detach().sum(1))
    gradients = [
        logit_gradient(scratch, own[0], lse, local, mask, None, LossTerms(smoothing, z_loss, vocab_size=20))
        for (own, scratch), (_, local) in zip(results, parts)
    ]
    torch.testing.assert_close(torch.cat(gradients, dim=1), logits.grad)
    for (part, _), gradient in zip(parts, gradients):
        assert part.data_ptr() == gradient.data_ptr(), "in place of the logits"
