"""How Hugging Face's architectures lay out what we keep in one global tensor: pairs of exact, inverse transforms.

``h`` hidden, ``g`` key/value groups, ``q`` queries a group, ``n = g * q`` heads, ``d`` head dim, ``f`` MLP width,
``v`` vocabulary (padded with us, not with them). Ours are in ``gpt.py``: linear weights ``[out, in]``, fused ``qkv``
``[g, q + 2, d, h]`` (a group's queries, its key, its value), ``gate_up`` ``[2, f, h]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ds.config import ModelConfig
from megatron_ds.convert.architecture import Rule

Tensors = Sequence[Tensor]
Layout = Callable[[str, str, str], Rule]
"""From our name of a weight or bias, their name of the block, and "weight" or "bias"."""


def same(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,), lambda c, w: (w,), lambda c, ws: ws[0])


def vocabulary(ours: str, theirs: str) -> Rule:
    """``[v, h]``, or a bias ``[v]``: our padding rows are cut off, or added as zeros."""

    def pad(c: ModelConfig, ws: Tensors) -> Tensor:
        return torch.cat([ws[0], ws[0].new_zeros(c.padded_vocab - c.vocab_size, *ws[0].shape[1:])])

    return Rule(ours, (theirs,), lambda c, w: (w[: c.vocab_size],), pad)


def twice(rule: Rule, also: str) -> Rule:
    """``rule``, of one tensor, that is also written under another name; the second is not read."""

    def to_hf(c: ModelConfig, w: Tensor) -> Tensors:
        return (*rule.to_hf(c, w), *rule.to_hf(c, w))

    return Rule(rule.ours, (*rule.theirs, also), to_hf, lambda c, ws: rule.from_hf(c, ws[:1]))


def _split(c: ModelConfig, w: Tensor) -> list[Tensor]:
    """Query ``[n d, h]``, key and value ``[g d, h]`` (or the biases, without ``h``)."""
    q = c.queries_per_kv_head
    return [part.reshape(-1, *w.shape[3:]) for part in (w[:, :q], w[:, q], w[:, q + 1])]


def _fuse(c: ModelConfig, ws: Tensors) -> Tensor:
    return torch.cat([w.view(c.num_kv_heads, -1, c.head_size, *w.shape[1:]) for w in ws], dim=1)


def separate_qkv(attention: str, names: Sequence[str] = ("q_proj", "k_proj", "v_proj")) -> Layout:
    """Llama, BERT: query, key and value apart."""

    def make(ours: str, layer: str, what: str) -> Rule:
        return Rule(ours, tuple(f"{layer}.{attention}.{name}.{what}" for name in names), _split, _fuse)

    return make


def _one(name: str, to_hf: Callable[[Any, Tensor], Tensor], from_hf: Callable[[Any, Tensor], Tensor]) -> Layout:
    """One tensor of ours that is one of theirs, ``name``, in another order."""

    def make(ours: str, layer: str, what: str) -> Rule:
        theirs = (f"{layer}.{name}.{what}",)
        return Rule(ours, theirs, lambda c, w: (to_hf(c, w),), lambda c, ws: from_hf(c, ws[0]))

    return make


def _transposed(w: Tensor) -> Tensor:
    """A bias stays as it is."""
    return w.t()


def stacked_qkv(name: str, conv: bool = False) -> Layout:
    """GPT-2, ModernBERT: all queries, then all keys, then all values, ``[3 n d, h]`` (the bias without ``h``).

    ``conv``: the weight is ``[h, 3 n d]``, as Conv1D.
    """
    turn = _transposed if conv else lambda w: w

    def stack(c: ModelConfig, w: Tensor) -> Tensor:
        return turn(w.transpose(0, 1).reshape(3 * c.num_heads * c.head_size, *w.shape[3:]))

    def unstack(c: ModelConfig, w: Tensor) -> Tensor:
        flat = turn(w)
        return flat.reshape(3, c.num_heads, c.head_size, *flat.shape[1:]).transpose(0, 1)

    return _one(name, stack, unstack)


def interleaved_qkv(name: str) -> Layout:
    """BLOOM, GPT-NeoX, Falcon: a group's queries, key and value together: our order, flat (the bias without ``h``)."""

    def apart(c: ModelConfig, w: Tensor) -> Tensor:
        return w.view(c.num_kv_heads, c.queries_per_kv_head + 2, c.head_size, *w.shape[1:])

    return _one(name, lambda c, w: w.reshape(-1, *w.shape[3:]), apart)


def grouped_qkv(name: str) -> Layout:
    """Phi-3: all queries, then all keys, then all values, ``[(n + 2 g) d, h]``."""

    def fuse(c: ModelConfig, w: Tensor) -> Tensor:
        return _fuse(c, w.split([c.num_heads * c.head_size, *[c.num_kv_heads * c.head_size] * 2]))

    return _one(name, lambda c, w: torch.cat(_split(c, w)), fuse)


def stacked_gate_up(name: str) -> Layout:
    """Phi-3, ModernBERT: the gate, then the up projection, ``[2 f, h]``: our order, flat."""
    return _one(name, lambda c, w: w.flatten(0, 1), lambda c, w: w.view(2, c.ffn_size, *w.shape[1:]))


def separate_gate_up(mlp: str) -> Layout:
    def make(ours: str, layer: str, what: str) -> Rule:
        names = (f"{layer}.{mlp}.gate_proj.{what}", f"{layer}.{mlp}.up_proj.{what}")
        return Rule(ours, names, lambda c, w: (w[0], w[1]), lambda c, ws: torch.stack(list(ws)))

    return make


def conv(name: str) -> Layout:
    """GPT-2: linear weights are ``[in, out]`` (the class ``Conv1D``)."""
    return _one(name, lambda c, w: _transposed(w), lambda c, w: _transposed(w))


def rules(
    before: Mapping[str, str], layer: str, inside: Mapping[str, str | Layout], after: Mapping[str, str]
) -> list[Rule]:
    """A rule for the weight and one for the bias of every module, in the order in which published files hold them.

    Args:
        before, after: modules outside of the blocks: our name to theirs. Rows of the vocabulary are padded.
        layer: their name of block ``{i}``. inside: our name within a block to theirs, or to how theirs is laid out.
    """

    def outside(modules: Mapping[str, str]) -> Iterator[Rule]:
        for ours, theirs in modules.items():
            for what in ("weight", "bias"):
                yield (vocabulary if ours in ("embedding", "head") else same)(f"{ours}.{what}", f"{theirs}.{what}")

    blocks = []
    for name, theirs in inside.items():
        for what in ("weight", "bias"):
            ours = f"layers.{{i}}.{name}.{what}"
            blocks.append(
                same(ours, f"{layer}.{theirs}.{what}") if isinstance(theirs, str) else theirs(ours, layer, what)
            )
    return [*outside(before), *blocks, *outside(after)]
