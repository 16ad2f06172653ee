"""A compiled forward pass for generation: the blocks of a model as Inductor graphs, on a CPU.

The model's own code is traced. Attention stays one operator a layer, called with the core of the step; everything else
between the matrix products is fused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

from megatron_ds.kernels.cpu.compiled_graph import compile_graph, record
from megatron_ds.kernels.registry import define
from megatron_ds.layers.attention_cores import AttentionCore, AttentionRules, MakeCore
from megatron_ds.models.transformer import MicroBatch, Transformer

_EXAMPLE = 61
"""Tokens for which a graph for any number is recorded: a prime, which is no size of a model."""
_CORES: ContextVar[list[AttentionCore]] = ContextVar("attention cores of the step")

define(
    "attend(Tensor q, Tensor k, Tensor v, int site, int kind) -> Tensor",
    lambda q, k, v, site, kind: _CORES.get()[kind].attend(q, k, v, site),
    lambda q, k, v, site, kind: q.new_empty((*q.shape[:2], q.shape[2] * q.shape[3])),
)


class _Recorded:
    """Stands for the core of the ``kind``-th rules while a graph is recorded."""

    def __init__(self, kind: int):
        self.kind = kind

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: int = 0) -> Tensor:
        out: Tensor = torch.ops.megatron_ds.attend(q, k, v, site, self.kind)
        return out


class CompiledStage:
    """What the vocabulary's projection is applied to, of a whole model in evaluation mode: one graph for one token, one
    for some.

    Args:
        compiled: False leaves the graphs to be run operator by operator.
    """

    def __init__(self, model: Transformer, compiled: bool = True):
        self._model, self._compiled = model, compiled
        self._one, self._some = self._graph(1), self._graph(_EXAMPLE)

    def head_input(self, micro_batch: MicroBatch, hidden: Tensor | None, make_core: MakeCore) -> Tensor:
        """``Transformer.head_input`` of its ``hidden_states``, for ``[1, t]`` tokens."""
        tokens, positions = micro_batch["tokens"], micro_batch["position_ids"]
        count = tokens.shape[1]
        run, kinds = self._one if count == 1 else self._some
        c, dtype = self._model.config, self._model.output_weight.dtype
        before = _CORES.set([make_core(rules, count, c.head_size, tokens.device, dtype) for rules in kinds])
        try:
            return run(tokens, positions)
        finally:
            _CORES.reset(before)

    def _graph(self, count: int) -> tuple[Callable[..., Tensor], list[AttentionRules]]:
        """For ``count`` tokens, or any number but 1; and the rules of the attentions in it."""
        kinds: list[AttentionRules] = []

        def make_core(rules: AttentionRules, *_: object) -> AttentionCore:
            kinds.append(rules)
            return _Recorded(len(kinds) - 1)

        def run(tokens: Tensor, positions: Tensor) -> Tensor:
            kinds.clear()
            micro_batch = {"tokens": tokens, "position_ids": positions}
            return self._model.head_input(self._model.hidden_states(micro_batch, None, make_core))

        places = torch.zeros(1, count, dtype=torch.int64)
        graph = record(run, (places, places.clone()), dynamic=count > 1)
        return compile_graph(graph) if self._compiled else lambda *args: graph(*args)[0], kinds
