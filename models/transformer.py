"""One pipeline stage of a transformer, whatever its blocks and its head: what GPT and BERT share.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden, ``v`` vocabulary. Between stages flows ``[s, b, h]``, or
``[s / tp, b, h]`` under sequence parallelism.

A parameter's name does not depend on the stage it lives in: block 17 is ``layers.17`` everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ds import comm
from megatron_ds.config import ModelConfig
from megatron_ds.config.sparse import layout_of_rank
from megatron_ds.kernels.alibi import Alibi
from megatron_ds.kernels.block_layout import BlockLayout
from megatron_ds.kernels.documents import Documents
from megatron_ds.layers.attention import AttentionInputs
from megatron_ds.layers.attention_cores import AttentionRules, MakeCore, make_core
from megatron_ds.layers.embedding import VocabParallelEmbedding, lookup
from megatron_ds.layers.linear import replicated_parameter
from megatron_ds.layers.loss import Logits, linear_cross_entropy
from megatron_ds.layers.norms import Norm
from megatron_ds.layers.position import Rotary, alibi_slopes, rotary_table
from megatron_ds.models.block import Block, RecomputedBlock, Stream, freed_for_loss, norm_settings
from megatron_ds.models.block import StageSettings as StageSettings
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.rng import DropoutKeys, dropout, initialize_parameters
from megatron_ds.shard import ShardedDim, ShardSpec, empty_parameter

MicroBatch = Mapping[str, Tensor]
Part = Literal["whole", "before loss", "loss"]

_EMBEDDING_SITE = 0  # of dropout; those of the blocks follow


class Table(nn.Module):
    """A bare ``weight``, so that a parameter used by its owner directly has a name like any layer's."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight


class Head(nn.Module):
    """What the projection to the vocabulary has of its own: no ``weight`` where it is the embedding's."""

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight, bias


class Transformer(nn.Module):
    """The model, or one pipeline stage of it: embedding, blocks, and the loss over the vocabulary.

    A norm lies between the last block and the vocabulary, unless each block ends with one. A subclass says what else.
    """

    def __init__(self, config: ModelConfig, settings: StageSettings | None = None):
        super().__init__()
        settings = settings or StageSettings()
        c, s = config, settings
        span = s.span or StageSpan(0, c.num_layers)
        self.config, self.settings, self.span, self.tp = c, s, span, s.mesh.tp
        self.sequence_parallel = s.partial
        self.compiled = False
        self.layouts: dict[int, BlockLayout] = {}  # of block-sparse attention, by sequence length
        if span.embedding or (span.head and c.tied_embeddings):
            self.embedding = VocabParallelEmbedding(
                "embedding",
                c.padded_vocab,
                c.hidden_size,
                sequence_parallel=s.sequence_parallel,
                init_std=c.init_std,
                replica=not span.embedding,
                **s.where,
            )
            if span.embedding and span.head and c.tied_embeddings:
                self.embedding.weight.grad_writes = 2  # type: ignore[attr-defined]  # the lookup's and the head's
        if span.embedding and c.position == "learned":
            self.position = Table(self._replicated("position.weight", (c.position_rows, c.hidden_size)))
        if span.embedding and c.token_types:
            self.token_type = Table(self._replicated("token_type.weight", (c.token_types, c.hidden_size)))
        norm: dict[str, Any] = {**norm_settings(c), "partial": s.partial, **s.where}
        if span.embedding and c.embedding_norm:
            self.embedding_norm = Norm("embedding_norm", "layernorm", c.hidden_size, **norm)
        self.layers = nn.ModuleDict({str(i): Block(c, i, s) for i in range(span.first, span.last)})
        self.recomputed = {str(i) for i in range(span.first, span.last) if s.recompute.whole_block(i)}
        if span.head:
            if c.resolved["norm_position"] != "post":
                self.final_norm = Norm("final_norm", c.norm, c.hidden_size, **norm)
            self.build_head(**norm)
            self.head = self._build_head_projection()
        # Of the layers that see all, and of those with a window.
        self.rotary = self._rotary()
        for kind, rotary in self.rotary.items():
            self.register_buffer(f"{kind}_frequencies", rotary.frequencies().to(s.device), persistent=False)
        local = c.num_heads // self.tp.size
        self.first_head = self.tp.rank * local
        slopes = alibi_slopes(c.num_heads)[self.first_head :][:local] if c.position == "alibi" else None
        self.slopes: Tensor | None
        self.register_buffer("slopes", None if slopes is None else slopes.to(s.device), persistent=False)

    def _rotary(self) -> dict[str, Rotary]:
        c = self.config
        if c.position != "rope":
            return {}
        full = window = Rotary(c.rotary_dim or c.head_size, c.rope_theta, c.rope_scaling)
        if c.window_rope_theta is not None:
            window = Rotary(full.dim, c.window_rope_theta)
        return {"full": full, "window": window}

    def _build_head_projection(self) -> Head:
        c, s = self.config, self.settings
        shape, shard = (c.padded_vocab, c.hidden_size), (ShardedDim.over(self.tp, 0),)
        weight = ShardSpec("head.weight", shape, shard, std=c.init_std)
        bias = ShardSpec("head.bias", shape[:1], shard, init="zeros", weight_decay=False)
        return Head(
            None if c.tied_embeddings else empty_parameter(weight, s.device, s.dtype),
            empty_parameter(bias, s.device, s.dtype) if c.resolved["head_bias"] else None,
        )

    def _replicated(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        """A matrix that every tensor-parallel rank holds whole and applies to its part of the sequence."""
        return replicated_parameter(
            name, shape, "normal", self.tp, self.sequence_parallel,
            weight_decay=True, std=self.config.init_std, device=self.settings.device, dtype=self.settings.dtype,
        )  # fmt: skip

    def build_head(self, **settings: Any) -> None:
        """Add what :meth:`head_input` has besides the last norm; ``settings`` are a norm's."""

    def head_input(self, x: Tensor) -> Tensor:
        """From the last block's output to what the projection to the vocabulary is applied to."""
        return self.final_norm(x) if hasattr(self, "final_norm") else x

    def initialize(self, seed: int) -> None:
        """Set every weight from (seed, its global name); padding rows of the vocabulary are zero."""
        initialize_parameters(self.parameters(), seed)
        for weight in (w for w in (self._table("embedding"), self._table("head")) if w is not None):
            first = self.tp.rank * weight.shape[0]
            weight.data[max(0, self.config.vocab_size - first) :].zero_()

    def _table(self, name: str) -> nn.Parameter | None:
        module = getattr(self, name, None)
        return None if module is None else module.weight

    defers_loss = True  # what follows takes ``part`` and ``seed``

    def forward(
        self,
        micro_batch: MicroBatch,
        hidden: Tensor | None = None,
        part: Part = "whole",
        seed: Tensor | None = None,
    ) -> Tensor:
        """Run this stage on one micro-batch.

        Args:
            micro_batch: ``tokens``, ``labels``, ``position_ids`` ``[b, s]`` int64, ``loss_mask`` ``[b, s]`` bool,
                ``sample_index`` ``[b]`` int64; ``document_ids`` ``[b, s]`` where documents are kept apart,
                their bounds ``document_bounds`` on the host (without them a GPU is waited for), ``token_type_ids``
                ``[b, s]`` where types differ (default: all 0).
            hidden: the previous stage's output; None on the first stage.
            part: of the last stage: all, what lies before the loss, or the loss alone of that (then ``hidden``).
            seed: what the backward pass of the loss will be called with, where it follows at once; 0-d.

        Returns:
            On the last stage the *sum* of the losses of the unmasked tokens (a scalar, fp32 or fp64); on the others
            the activation for the next stage.
        """
        last, freed = str(self.span.last - 1), 0
        if self.span.head and last in self.layers:
            if (seed is not None or part == "before loss") and not self.compiled and last not in self.recomputed:
                freed = freed_for_loss(self.config, self.tp.size, micro_batch["tokens"].numel(), self.output_weight)
            cast(Block, self.layers[last]).mlp.recompute_activation = freed > 0
        x = hidden if part == "loss" and hidden is not None else self.hidden_states(micro_batch, hidden)
        if not self.span.head or part == "before loss":
            return x
        y = self.head_input(x)
        return linear_cross_entropy(
            y,
            self.output_weight,
            micro_batch["labels"].t(),
            micro_batch["loss_mask"].t(),
            vocab_size=self.config.vocab_size,
            logits=Logits(self.head.bias, self.config.logit_softcap, seed, seed is not None and y is not x, freed),
            tp=self.tp,
            sequence_parallel=self.sequence_parallel,
            label_smoothing=self.settings.label_smoothing if self.training else 0.0,
            z_loss=self.settings.z_loss if self.training else 0.0,
        )

    @property
    def output_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.embedding.weight if self.config.tied_embeddings else self.head.weight)

    def hidden_states(
        self, micro_batch: MicroBatch, hidden: Tensor | None = None, make_core: MakeCore = make_core
    ) -> Tensor:
        """The output of this stage's blocks; ``make_core`` says where their keys and values are."""
        kinds = {self.config.has_window(int(name)) for name in self.layers} or {False}
        ids, documents = micro_batch.get("document_ids"), None
        if ids is not None:
            documents = Documents.of_ids(ids, micro_batch.get("document_bounds"))
        dtype = self.embedding.weight.dtype if hidden is None else hidden.dtype  # another parameter's may be wider
        shared = {window: self._inputs(micro_batch, documents, window, make_core, dtype) for window in kinds}
        x = self._embed(micro_batch, shared[min(kinds)]) if self.span.embedding else hidden
        assert x is not None, "a stage without the embedding needs the previous stage's output"
        stream, p = Stream(x), self.config.hidden_dropout
        for name, block in self.layers.items():
            inputs = shared[self.config.has_window(int(name))]
            if name in self.recomputed and torch.is_grad_enabled():
                stream = checkpoint(
                    RecomputedBlock(cast(Block, block), self.compiled),
                    stream.sum(p),
                    inputs,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                stream = block(stream, inputs)
        return stream.sum(p)

    def logits(self, micro_batch: MicroBatch, hidden: Tensor | None = None) -> Tensor:
        """``[b, s, vocab_size]``, whole on every rank of tp; for evaluation, without gradients through tp."""
        x = self.head_input(self.hidden_states(micro_batch, hidden))
        if self.sequence_parallel:
            x = comm.gather_dim0(x, self.tp).wait()
        local = self.local_logits(x).permute(2, 1, 0)
        return comm.gather_dim0(local, self.tp).wait()[: self.config.vocab_size].permute(1, 2, 0)

    def local_logits(self, x: Tensor, linear: Callable[..., Tensor] = F.linear) -> Tensor:
        """``[..., h] -> [..., v / tp]`` of the padded vocabulary, from what :meth:`head_input` gives."""
        scores = linear(x, self.output_weight, self.head.bias)
        cap = self.config.logit_softcap
        # Not in place: torch cannot record such a tanh of half precision.
        return scores if cap is None else scores.div_(cap).tanh().mul_(cap)

    def _embed(self, micro_batch: MicroBatch, inputs: AttentionInputs) -> Tensor:
        tokens = micro_batch["tokens"].t()
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * x.new_full((), self.config.embedding_scale)  # rounded to the dtype, as Gemma's is
        if self.config.position == "learned":
            x = x + lookup(self._own(inputs.positions) + self.config.position_offset, self.position.weight)
        if self.config.token_types:
            types = micro_batch.get("token_type_ids")
            types = torch.zeros_like(tokens) if types is None else types.t()
            x = x + lookup(self._own(types), self.token_type.weight)
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        return dropout(x, self.config.hidden_dropout, inputs.keys, _EMBEDDING_SITE)

    def _own(self, of_sequence: Tensor) -> Tensor:
        """This rank's part of ``[s, b]``."""
        return comm.slice_dim0(of_sequence, self.tp) if self.sequence_parallel else of_sequence

    def _inputs(
        self,
        micro_batch: MicroBatch,
        documents: Documents | None,
        window: bool,
        make_core: MakeCore,
        dtype: torch.dtype,
    ) -> AttentionInputs:
        """What the layers with a window share, or those without."""
        positions = micro_batch["position_ids"].t()
        length = positions.shape[0]
        keys = None
        if self.training and (self.config.hidden_dropout or self.config.attention_dropout):
            offset = self.tp.rank * (length // self.tp.size) if self.sequence_parallel else 0
            keys = DropoutKeys(self.settings.dropout_seed, micro_batch["sample_index"], offset)
        rules = AttentionRules(
            causal=self.config.causal,
            documents=documents,
            alibi=self._alibi(),
            window=self.config.window if window else None,
            softcap=self.config.attention_softcap,
            dropout=self.config.attention_dropout,
            keys=keys,
            first_head=self.first_head,
            layout=self._layout(length, positions.device),
        )
        core = make_core(rules, length, self.config.head_size, positions.device, dtype)
        return AttentionInputs(
            positions, core, self._rotary_table(positions, "window" if window else "full", dtype), keys
        )

    def _alibi(self) -> Alibi | None:
        """Of this rank's heads."""
        if self.slopes is None:
            return None
        return Alibi(self.slopes, self.config.head_size**-0.5 if self.config.alibi == "rounded" else None)

    def _rotary_table(self, positions: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if not self.rotary:
            return None
        rotary, length = self.rotary[kind], positions.shape[0]
        fixed: Tensor = getattr(self, f"{kind}_frequencies")
        frequencies = rotary.frequencies(length) if rotary.depends_on(length) else fixed
        return rotary_table(positions, frequencies, dtype, rotary.amplitude)

    def _layout(self, length: int, device: torch.device) -> BlockLayout | None:
        """The blocks that this rank's heads compute: its slice of the whole model's, which knows no mesh."""
        sparse, heads = self.config.attention.sparse, self.config.num_heads
        if sparse.mode == "none":
            return None
        if length not in self.layouts:
            layout = layout_of_rank(sparse, length, heads, self.tp.rank, self.tp.size, causal=self.config.causal)
            self.layouts[length] = layout.to(device)
        return self.layouts[length]

    def compile_blocks(self) -> None:
        """``torch.compile`` whole blocks on a GPU, only the activations on a CPU.

        On a GPU the compiler fuses the references of norms, rotary and activations itself. It is not the default there:
        what it makes of a block of GPT-2 takes 12 launches more than our kernels to add up gradients alone, and the
        weights' gradients pass through half precision, with 4 bytes more a weight and micro-batch.

        Traced whole, blocks on a CPU lose the matmuls and the attention that are faster than the compiler's.
        """
        self.compiled = True
        for block in cast(Iterable[Block], self.layers.values()):
            if next(self.parameters()).device.type == "cpu":
                block.mlp.compile_activation()
            else:
                block.compile()

    @property
    def shares_embedding(self) -> bool:
        """Whether this stage's embedding is tied to a copy on another stage."""
        return self.config.tied_embeddings and self.span.embedding != self.span.head
