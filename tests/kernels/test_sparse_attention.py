"""Block-sparse attention against dense attention with the same mask, and what it may not do: look ahead, grow, vary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from megatron_ds.errors import ConfigError
from megatron_ds.kernels import block_patterns as patterns
from megatron_ds.kernels import registry
from megatron_ds.kernels import sparse_attention as module
from megatron_ds.kernels.block_layout import BlockLayout, from_mask
from megatron_ds.kernels.sparse_attention import _flat, sparse_attention

B, N, G, D, BLOCK = 2, 4, 2, 8, 16
TOLERANCE = 1e-12

LAYOUTS: dict[str, Any] = {
    "dense": patterns.dense,
    "sliding_window": patterns.sliding_window,
    "fixed": partial(patterns.fixed, num_local_blocks=2, num_different_global_patterns=2),
    "variable": partial(patterns.variable, num_random_blocks=1, local_window_blocks=[2, 1]),
    "bigbird": partial(patterns.bigbird, different_layout_per_head=True),
    "bslongformer": patterns.bslongformer,
}


def inputs(length: int, groups: int = G, dtype: torch.dtype = torch.float64, d: int = D) -> list[Tensor]:
    """q, k, v and a gradient, in a model's memory order: not contiguous as the op sees them."""
    generator = torch.Generator().manual_seed(length)

    def draw(heads: int) -> Tensor:
        x = torch.randn(length, B, heads, d + 3, generator=generator, dtype=torch.float64).to(dtype)
        return x[..., :d].permute(1, 2, 0, 3)

    return [draw(heads) for heads in (N, groups, groups, N)]


def gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, leaves, grad)]


def sparse(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, layout: BlockLayout, **settings: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return gradients(sparse_attention(*leaves, layout, **settings), leaves, grad)


def dense(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, allowed: Tensor, scale: float = D**-0.5) -> list[Tensor]:
    """Softmax over the allowed keys by the formula; queries without any give zeros."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    many_keys, many_values = (x.repeat_interleave(N // x.shape[1], 1) for x in leaves[1:])
    scores = (leaves[0] @ many_keys.transpose(-2, -1) * scale).masked_fill(~allowed, -torch.inf)
    weights = (scores - scores.detach().amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    out = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ many_values
    return gradients(out, leaves, grad)


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want):
        torch.testing.assert_close(x, y, rtol=0.0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_to_dense_attention_with_the_same_mask(name: str, causal: bool, groups: int) -> None:
    for length in (80, 71, 16, 3):
        layout = LAYOUTS[name](length, BLOCK, N, causal=causal)
        x = inputs(length, groups)
        assert_close(sparse(*x, layout), dense(*x, layout.to_mask()))


@pytest.mark.parametrize("chunk", [1, 16 * 16 * B * N * 3])
def test_the_size_of_a_chunk_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = patterns.bigbird(144, BLOCK, N, different_layout_per_head=True)
    x = inputs(144)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert_close(sparse(*x, layout), dense(*x, layout.to_mask()))


def test_all_blocks_live_is_torchs_attention() -> None:
    for causal in (True, False):
        q, k, v, grad = inputs(75)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        want = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
        layout = patterns.dense(75, BLOCK, N, causal=causal)
        assert_close(sparse(q, k, v, grad, layout), gradients(want, leaves, grad))


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_output_hears_from_a_later_token(name: str) -> None:
    """Each token in turn is changed beyond recognition; nothing before it may move by a bit, itself it must."""
    length = 40
    layout = LAYOUTS[name](length, BLOCK, N, causal=True)
    q, k, v, _ = inputs(length)
    before = sparse_attention(q, k, v, layout)
    for token in range(length):
        later_q, later_k, later_v = (x.clone() for x in (q, k, v))
        for x in (later_q, later_k, later_v):
            x[:, :, token:] = 1e3 * x[:, :, token:] - 7.0
        after = sparse_attention(later_q, later_k, later_v, layout)
        assert torch.equal(after[:, :, :token], before[:, :, :token]), token
        assert (after[:, :, token] != before[:, :, token]).all(), token


def test_queries_without_keys_give_zeros_and_no_gradient() -> None:
    allowed = torch.rand(N, 70, 70, generator=torch.Generator().manual_seed(1)) < 0.3
    allowed[:, 16:32] = False  # a row of blocks
    allowed[1, 40:43] = False  # single queries in blocks that are live
    allowed[2] = False  # a whole head
    allowed[:, :, 50] = False  # a key that nobody asks for
    x = inputs(70)
    found = sparse(*x, from_mask(allowed, BLOCK))
    assert_close(found, dense(*x, allowed))
    out, dq, dk, dv = found
    for nothing in (out[:, :, 16:32], out[:, 1, 40:43], out[:, 2], dq[:, :, 16:32], dk[:, :, 50], dv[:, :, 50]):
        assert (nothing == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    layout = patterns.bigbird(90, BLOCK, N)
    x = inputs(90, dtype=dtype)
    found = sparse(*x, layout)
    assert {y.dtype for y in found} == {dtype}
    want = [y.to(dtype) for y in dense(*(y.double() for y in x), layout.to_mask())]
    largest = max(float(y.detach().abs().max()) for y in want)
    assert_close([y.float() for y in found], [y.float() for y in want], 4 * torch.finfo(dtype).eps * largest)


def test_large_logits_do_not_overflow() -> None:
    layout = patterns.sliding_window(64, BLOCK, N)
    q, k, v, grad = inputs(64)
    x = [300.0 * q, 300.0 * k, v, grad]
    found = sparse(*x, layout)
    assert all(y.isfinite().all() for y in found)
    assert_close(found, dense(*x, layout.to_mask()), 1e-8)


def test_a_batch_of_nothing() -> None:
    layout, x = patterns.bigbird(40, BLOCK, N), [y[:0] for y in inputs(40)]
    assert [y.shape for y in sparse(*x, layout)] == [x[0].shape, *(y.shape for y in x[:3])]


def test_the_scale_is_the_callers() -> None:
    layout, x = patterns.dense(32, BLOCK, N), inputs(32)
    assert_close(sparse(*x, layout, scale=0.9), dense(*x, layout.to_mask(), 0.9))


def test_finite_differences_agree_with_the_gradients() -> None:
    layout = patterns.variable(20, BLOCK, 2, num_random_blocks=1)
    q, k, v = (torch.randn(1, h, 20, 3, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda *x: sparse_attention(*x, layout), (q, k, v), fast_mode=True)


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    layout = patterns.bigbird(40, BLOCK, N)
    q, k, v = (x.requires_grad_() for x in inputs(40, dtype=torch.float32)[:3])
    torch.library.opcheck(
        torch.ops.megatron_ds.sparse_attention.default, (q, k, v, _flat(layout), BLOCK, False, 0.3, "reference")
    )
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = torch.ops.megatron_ds.sparse_attention(q, k, v, _flat(layout), BLOCK, False, 0.3, "reference")
    torch.library.opcheck(
        torch.ops.megatron_ds.sparse_attention_backward.default,
        (torch.randn_like(q), q, k, v, out, lse, _flat(layout), BLOCK, False, 0.3, "reference"),
    )


def test_torch_compile_keeps_the_operator_whole() -> None:
    layout, x = patterns.bigbird(40, BLOCK, N), inputs(40)

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(2 * q, k, v, layout)

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    leaves = [y.detach().requires_grad_() for y in x[:3]]
    assert_close(gradients(compiled(*leaves), leaves, x[3]), gradients(twice(*leaves), leaves, x[3]))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_computes_the_same_from_the_block_mask(causal: bool) -> None:
    layout = patterns.bigbird(96, BLOCK, N, causal=causal, different_layout_per_head=True)
    q, k, v, _ = inputs(96, d=16)
    want = flex_attention(q, k, v, block_mask=layout.to_block_mask(), enable_gqa=True)
    assert isinstance(want, Tensor)
    torch.testing.assert_close(sparse_attention(q, k, v, layout), want, rtol=0.0, atol=1e-12)


def test_the_result_has_the_memory_order_of_the_queries() -> None:
    q = torch.randn(40, B, N, D).permute(1, 2, 0, 3)
    out = sparse_attention(q, q, q, patterns.dense(40, BLOCK, N))
    assert out.stride() == q.stride(), "the model would copy it"


def test_the_choice_is_reported_and_refused_where_it_cannot_run() -> None:
    (line,) = [str(c) for c in registry.report("cpu", torch.float32) if c.op == "sparse_attention"]
    assert line == "sparse_attention: reference (the device is cpu)"
    x, layout = inputs(32)[:3], patterns.dense(32, BLOCK, N)
    with registry.use({"sparse_attention": "triton"}), pytest.raises(ConfigError, match="float64"):
        sparse_attention(*x, layout)
    wide = inputs(32, d=136, dtype=torch.float32)[:3]
    with registry.use({"sparse_attention": "triton"}), pytest.raises(ConfigError, match="up to 128, not 136"):
        sparse_attention(*wide, layout)


def test_sizes_that_do_not_fit_are_refused() -> None:
    q, k, v, _ = inputs(32)
    layout = patterns.dense(32, BLOCK, N)
    with pytest.raises(ConfigError, match=r"layout is of 4 heads and 32 tokens, the queries of 4 heads and 20"):
        sparse_attention(q[:, :, :20], k[:, :, :20], v[:, :, :20], layout)
    with pytest.raises(ConfigError, match=r"layout is of 4 heads .* the queries of 2 heads"):
        sparse_attention(q[:, :2], k, v, layout)
    with pytest.raises(ConfigError, match="kv_heads divide the query heads"):
        sparse_attention(q[:, :3], k, v, layout)
    with pytest.raises(ConfigError, match=r"layout is on meta.*layout.to\(device\)"):
        sparse_attention(q, k, v, layout.to("meta"))
    with pytest.raises(ConfigError, match=r"scores times -1.0: the scale must be positive"):
        sparse_attention(q, k, v, layout, scale=-1.0)


_LONG = """
import json, resource, sys, time, torch
from megatron_ds.kernels.block_patterns import dense, sliding_window
from megatron_ds.kernels.sparse_attention import sparse_attention

torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(length, layout, heads):
    start, before = time.process_time(), peak()
    q, k, v = (torch.randn(1, heads, length, 32, requires_grad=True) for heads in (heads, 1, 1))
    sparse_attention(q, k, v, layout(length, 64, heads)).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    return time.process_time() - start, peak() - before
run(1024, dense, 1)
json.dump([run(4096, dense, 4), run(16384, sliding_window, 2), run(32768, sliding_window, 2)], sys.stdout)
"""


def test_a_long_sequence_in_little_memory_and_time() -> None:
    """Forward and backward in fp32. Dense scores would be 256 MB for 4 heads at 4k tokens, 8 GB for 2 at 32k."""
    done = subprocess.run([sys.executable, "-c", _LONG], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (_, all_live), (seconds, at_16k), (_, at_32k) = json.loads(done.stdout)
    assert all_live < 200, "MB: a score matrix is held where all blocks are live"
    assert seconds < 10, "seconds of one core at 16k tokens"
    assert at_16k < 250 and at_32k < 250, "MB more than before"


# --- the Triton twin --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """All cases in one process: Triton decides on its interpreter when kernels are decorated."""
    pytest.importorskip("triton", reason="Triton is not installed")
    program = Path(__file__).parent / "sparse_interpreted.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CASES = (
    "sliding", "sliding, odd length, half", "local windows, grouped",
    "half", "grouped", "odd length", "odd length both ways", "padded head dim", "empty rows",
    "shorter than a block", "several tiles a block", "several tiles a block, half", "long columns",
    "long columns, all of them partial", "specialised warps", "large logits", "the public op",
)  # fmt: skip


def test_every_case_ran(interpreted: dict[str, dict[str, float]]) -> None:
    assert set(interpreted) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_triton_under_the_interpreter(interpreted: dict[str, dict[str, float]], case: str) -> None:
    """Errors relative to the tolerance; infinite where a result has NaN or something around it was written."""
    errors = interpreted[case]
    assert errors and max(errors.values()) < 1.0, errors
