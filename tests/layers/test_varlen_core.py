"""Attention over packed documents and windows as a GPU computes it: how torch's kernel is called, and what it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.data.loader import to_device
from megatron_ds.kernels import varlen_attention as ours
from megatron_ds.kernels.documents import Documents
from megatron_ds.layers.attention_cores import AttentionRules, BlockCore, VarlenCore, make_core

S, B, D = 24, 3, 8
IDS = torch.tensor([[0] * 24, [0] * 5 + [1] * 1 + [2] * 18, [3] * 11 + [0] * 11 + [7] * 2])
RULES = [
    {"documents": True},
    {"documents": True, "window": 4},
    {"window": 4},
    {"window": 4, "causal": False},
    {"documents": True, "causal": False},
]


def qkv(heads: int, groups: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = [(S, B, n, D) for n in (heads, groups, groups)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def rules_of(settings: dict[str, Any], device: str = "cpu") -> AttentionRules:
    ids = IDS.to(device)
    return AttentionRules(**{**settings, "documents": Documents.of_ids(ids) if "documents" in settings else None})


def with_gradients(core: Any, tensors: list[Tensor]) -> list[Tensor]:
    out = core.attend(*tensors)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("settings", RULES, ids=str)
def test_equals_attention_by_blocks(settings: dict[str, Any], heads: int, groups: int) -> None:
    what = rules_of(settings)
    varlen = with_gradients(VarlenCore(what.causal, what.window, what.documents), qkv(heads, groups, torch.float64))
    for got, want in zip(varlen, with_gradients(BlockCore(what), qkv(heads, groups, torch.float64)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


class _OnTheGPU(Tensor):
    """A CPU tensor that says it is on a GPU, so that the branch for one is taken."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


@pytest.mark.parametrize("grouped_by_itself", [True, False], ids=["torch 2.11", "torch 2.13"])
@pytest.mark.parametrize("settings", RULES, ids=str)
def test_what_torchs_kernel_is_asked_for(
    settings: dict[str, Any], grouped_by_itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's documentation: window (left, right) of -1 is without bound, (-1, 0) causal."""

    def documented(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **o: Any
    ) -> Any:
        assert cu_q is cu_k and cu_q.dtype == torch.int32 and max_q == max_k == int(cu_q.diff().max())
        left, right = o["window_size"]
        out = []
        for begin, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist()):
            i, j = torch.meshgrid(torch.arange(end - begin), torch.arange(end - begin), indexing="ij")
            seen = ((left < 0) | (j >= i - left)) & ((right < 0) | (j <= i + right))
            parts = [t.as_subclass(Tensor)[begin:end].transpose(0, 1) for t in (q, k, v)]
            parts[1:] = [t.repeat_interleave(q.shape[1] // t.shape[0], 0) for t in parts[1:]]
            out.append(F.scaled_dot_product_attention(*parts, attn_mask=seen).transpose(0, 1))
        return torch.cat(out)

    def newer(*given: Any, window_size: tuple[int, int], enable_gqa: bool = False) -> Any:
        assert enable_gqa
        return documented(*given, window_size=window_size)

    kernel, told_to_group = ours.gpu_kernel()
    assert callable(kernel) and isinstance(told_to_group, bool)
    kernel = documented if grouped_by_itself else newer
    monkeypatch.setattr(ours, "gpu_kernel", lambda: (kernel, not grouped_by_itself))
    what = rules_of(settings)
    pretended = [t.detach().as_subclass(_OnTheGPU) for t in qkv(4, 2, torch.float64)]
    got = VarlenCore(what.causal, what.window, what.documents).attend(*pretended).as_subclass(Tensor)
    torch.testing.assert_close(got, BlockCore(what).attend(*qkv(4, 2, torch.float64)), rtol=0, atol=1e-12)


def test_the_data_gives_the_bounds() -> None:
    """So that a GPU is not waited for; they are those that the ids say."""
    batch = to_device({"document_ids": IDS}, torch.device("meta"))
    bounds = batch["document_bounds"]
    assert batch["document_ids"].is_meta and bounds.device.type == "cpu" and bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 24, 29, 30, 48, 59, 70, 72]
    for documents in (Documents.of_ids(IDS), Documents.of_ids(IDS, bounds)):
        found, longest = documents.cumulative
        assert torch.equal(found, bounds) and longest == 24


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2)])
@pytest.mark.parametrize("settings", RULES, ids=str)
def test_on_a_gpu(settings: dict[str, Any], heads: int, groups: int) -> None:
    core = make_core(rules_of(settings, "cuda"), S, D, torch.device("cuda"), torch.bfloat16)
    assert isinstance(core, VarlenCore)
    gpu = with_gradients(core, qkv(heads, groups, torch.bfloat16, "cuda"))
    exact = [t.detach().double().requires_grad_() for t in qkv(heads, groups, torch.bfloat16)]
    for got, want in zip(gpu, with_gradients(BlockCore(rules_of(settings)), exact), strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=0.03)
