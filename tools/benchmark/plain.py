"""The yardstick: GPT-2 and Llama in plain torch, and the loop one would write around them (in the manner of nanoGPT).

No parallel code and nothing of megatron_ds: fused QKV, ``F.scaled_dot_product_attention``, ``F.cross_entropy`` over
the whole logits, ``torch.optim.AdamW(fused=True)``, ``clip_grad_norm_``, bf16 by autocast.

Shapes: `b` batch, `s` sequence, `h` hidden, `n` heads, `d` head dim, `v` vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from setting import Workload, decay_groups
from torch import nn


class Block(nn.Module):
    """Pre-norm attention and MLP; ``[b, s, h]`` to ``[b, s, h]``."""

    def __init__(self, w: Workload):
        super().__init__()
        self.head_dim = w.hidden // w.heads
        self.norm1 = nn.LayerNorm(w.hidden)
        self.qkv = nn.Linear(w.hidden, 3 * w.hidden)
        self.out = nn.Linear(w.hidden, w.hidden)
        self.norm2 = nn.LayerNorm(w.hidden)
        self.up = nn.Linear(w.hidden, 4 * w.hidden)
        self.down = nn.Linear(4 * w.hidden, w.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The number of heads and the length follow from the QKV: a tensor-parallel plan may give this block half of
        # the heads, or a part of the sequence between the linear layers.
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Logits ``[b, s, v]`` of tokens ``[b, s]``; with ``targets``, the mean loss instead."""

    def __init__(self, w: Workload):
        super().__init__()
        self.tokens = nn.Embedding(w.vocab, w.hidden)
        self.positions = nn.Embedding(w.sequence, w.hidden)
        self.blocks = nn.ModuleList(Block(w) for _ in range(w.layers))
        self.norm = nn.LayerNorm(w.hidden)
        self.head = nn.Linear(w.hidden, w.vocab, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * w.layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class LlamaBlock(nn.Module):
    """Pre-norm attention with rotary positions, and SwiGLU; ``[b, s, h]`` to ``[b, s, h]``."""

    def __init__(self, w: Workload):
        super().__init__()
        self.head_dim = w.hidden // w.heads
        self.norm1 = nn.RMSNorm(w.hidden, eps=1e-5)
        self.qkv = nn.Linear(w.hidden, 3 * w.hidden, bias=False)
        self.out = nn.Linear(w.hidden, w.hidden, bias=False)
        self.norm2 = nn.RMSNorm(w.hidden, eps=1e-5)
        self.gate_up = nn.Linear(w.hidden, 2 * w.ffn, bias=False)
        self.down = nn.Linear(w.ffn, w.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """Mean loss of tokens and targets ``[b, s]``."""

    def __init__(self, w: Workload):
        super().__init__()
        self.tokens = nn.Embedding(w.vocab, w.hidden)
        self.blocks = nn.ModuleList(LlamaBlock(w) for _ in range(w.layers))
        self.norm = nn.RMSNorm(w.hidden, eps=1e-5)
        self.head = nn.Linear(w.hidden, w.vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
        dim = w.hidden // w.heads
        angles = torch.outer(torch.arange(w.sequence), 10000.0 ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def autocast(w: Workload, device: str = "cpu") -> contextlib.AbstractContextManager[object]:
    """bf16 by autocast, the natural way for a plain loop: fp32 weights, bf16 matmuls; nothing for other dtypes."""
    return torch.autocast(device, torch.bfloat16) if w.dtype == "bf16" else contextlib.nullcontext()


def build(w: Workload, device: str = "cpu") -> Any:
    """The model with seeded weights, in bf16 throughout for ``bf16-pure``."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(w) if w.family == "llama" else GPT(w)
    return model.bfloat16() if w.dtype == "bf16-pure" else model


def adamw(model: nn.Module, w: Workload) -> torch.optim.AdamW:
    return torch.optim.AdamW(decay_groups(model, w.weight_decay), lr=w.lr, betas=w.betas, fused=True)


def training_step(
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    model: nn.Module,
    w: Workload,
    optimizer: torch.optim.Optimizer,
    rank: int = 0,
    ranks: int = 1,
    device: str = "cpu",
) -> Callable[[], torch.Tensor]:
    """The loop's body: forward, backward, clip, update. ``loss_of(tokens, targets)`` is the mean loss."""
    draw = w.batches(rank, ranks, device)
    parameters = list(model.parameters())

    def step() -> torch.Tensor:
        for tokens, targets in zip(*(t.chunk(w.accumulate) for t in draw())):
            with autocast(w, device):
                loss = loss_of(tokens, targets)
            (loss / w.accumulate if w.accumulate > 1 else loss).backward()
        nn.utils.clip_grad_norm_(parameters, w.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def plain(w: Workload, compiled: bool = False, device: str = "cpu") -> Callable[[], torch.Tensor]:
    """One process, eager or under ``torch.compile`` as a whole model."""
    model = build(w, device)
    optimizer = adamw(model, w)
    return training_step(torch.compile(model) if compiled else model, model, w, optimizer, device=device)
