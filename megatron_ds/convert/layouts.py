"""How Hugging Face's architectures lay out what we keep in one global tensor: pairs of exact, inverse transforms.

``h`` hidden, ``g`` key/value groups, ``q`` queries a group, ``n = g * q`` heads, ``d`` head dim, ``f`` MLP width,
``v`` vocabulary (padded with us, not with them). Ours are in ``gpt.py``: linear weights ``[out, in]``, fused ``qkv``
``[g, q + 2, d, h]`` (a group's queries, its key, its value), ``gate_up`` ``[2, f, h]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_ds.config import ModelConfig
from megatron_ds.convert.architecture import Rule

Tensors = Sequence[Tensor]
Layout = Callable[[str, str, str], Rule]
"""From our name of a weight or bias, their name of the block, and "weight" or "bias"."""


def same(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,), lambda c, w: (w,), lambda c, ws: ws[0])


def transposed(ours: str, theirs: str) -> Rule:
    """GPT-2 at Hugging Face keeps its linear weights as ``[in, out]`` (its class ``Conv1D``)."""
    return Rule(ours, (theirs,), lambda c, w: (w.t(),), lambda c, ws: ws[0].t())


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


def _qkv_shape(c: ModelConfig, theirs: Tensor) -> tuple[int, ...]:
    """Ours, of a weight or (no last dim) a bias."""
    return (c.num_kv_heads, c.queries_per_kv_head + 2, c.head_size, *theirs.shape[1:])


def separate_qkv(attention: str, names: Sequence[str] = ("q_proj", "k_proj", "v_proj")) -> Layout:
    """Llama, BERT: query ``[n d, h]``, key and value ``[g d, h]`` apart (or the biases, without ``h``)."""

    def split(c: ModelConfig, w: Tensor) -> Tensors:
        q = c.queries_per_kv_head
        return [part.reshape(-1, *w.shape[3:]) for part in (w[:, :q], w[:, q], w[:, q + 1])]

    def fuse(c: ModelConfig, ws: Tensors) -> Tensor:
        per_group = [w.view(c.num_kv_heads, -1, c.head_size, *w.shape[1:]) for w in ws]
        return torch.cat(per_group, dim=1)

    def make(ours: str, layer: str, what: str) -> Rule:
        return Rule(ours, tuple(f"{layer}.{attention}.{name}.{what}" for name in names), split, fuse)

    return make


def stacked_qkv(name: str, conv: bool = False) -> Layout:
    """GPT-2, ModernBERT: all queries, then all keys, then all values, ``[3 n d, h]`` (the bias without ``h``).

    ``conv``: the weight is ``[h, 3 n d]``, as Conv1D.
    """

    def make(ours: str, layer: str, what: str) -> Rule:
        turned = conv and what == "weight"

        def stack(c: ModelConfig, w: Tensor) -> Tensors:
            flat = w.transpose(0, 1).reshape(3 * c.num_heads * c.head_size, *w.shape[3:])
            return (flat.t() if turned else flat,)

        def unstack(c: ModelConfig, ws: Tensors) -> Tensor:
            flat = ws[0].t() if turned else ws[0]
            return flat.reshape(3, c.num_heads, c.head_size, *flat.shape[1:]).transpose(0, 1)

        return Rule(ours, (f"{layer}.{name}.{what}",), stack, unstack)

    return make


def interleaved_qkv(name: str) -> Layout:
    """BLOOM, GPT-NeoX, Falcon: a group's queries, key and value together: our order, flat (the bias without ``h``)."""

    def make(ours: str, layer: str, what: str) -> Rule:
        return Rule(
            ours,
            (f"{layer}.{name}.{what}",),
            lambda c, w: (w.reshape(-1, *w.shape[3:]),),
            lambda c, ws: ws[0].view(_qkv_shape(c, ws[0])),
        )

    return make


def grouped_qkv(name: str) -> Layout:
    """Phi-3: all queries, then all keys, then all values, ``[(n + 2 g) d, h]``."""

    def make(ours: str, layer: str, what: str) -> Rule:
        apart = separate_qkv("")(ours, layer, what)

        def split(c: ModelConfig, ws: Tensors) -> Tensor:
            sizes = [c.num_heads * c.head_size, c.num_kv_heads * c.head_size, c.num_kv_heads * c.head_size]
            return apart.from_hf(c, ws[0].split(sizes))

        return Rule(ours, (f"{layer}.{name}.{what}",), lambda c, w: (torch.cat(list(apart.to_hf(c, w))),), split)

    return make


def stacked_gate_up(name: str) -> Layout:
    """Phi-3, ModernBERT: the gate, then the up projection, ``[2 f, h]``: our order, flat."""

    def make(ours: str, layer: str, what: str) -> Rule:
        return Rule(
            ours,
            (f"{layer}.{name}.{what}",),
            lambda c, w: (w.flatten(0, 1),),
            lambda c, ws: ws[0].view(2, c.ffn_size, *ws[0].shape[1:]),
        )

    return make


def separate_gate_up(mlp: str) -> Layout:
    def make(ours: str, layer: str, what: str) -> Rule:
        names = (f"{layer}.{mlp}.gate_proj.{what}", f"{layer}.{mlp}.up_proj.{what}")
        return Rule(ours, names, lambda c, w: (w[0], w[1]), lambda c, ws: torch.stack(list(ws)))

    return make


def conv(name: str) -> Layout:
    """GPT-2: a linear weight as ``[in, out]`` (the class ``Conv1D``)."""

    def make(ours: str, layer: str, what: str) -> Rule:
        return (transposed if what == "weight" else same)(ours, f"{layer}.{name}.{what}")

    return make


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
