"""The transformer block: attention and MLP, their norms and residual sums, in every order that models have them.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden. A block maps the residual stream, ``[s(/tp), b, h]``, to the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_ds.config import ModelConfig, RecomputeConfig
from megatron_ds.kernels.dropout import dropout_add
from megatron_ds.kernels.registry import on_gpu
from megatron_ds.layers.attention import AttentionConfig, AttentionInputs, SelfAttention
from megatron_ds.layers.linear import BiasOffer, output_std
from megatron_ds.layers.loss import traffic_spared
from megatron_ds.layers.mlp import MLP
from megatron_ds.layers.norms import Norm
from megatron_ds.mesh import Mesh
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.rng import keys_of_rows

SITES_A_BLOCK = 3
"""Dropouts of a block: of the attention's output, of the MLP's, and of the attention's probabilities."""


@dataclass(frozen=True)
class StageSettings:
    """What the layers of a stage depend on besides the model's own settings.

    Attributes:
        span: which part of the model to build; None: all of it.
        sequence_parallel: split activations along the sequence over tp, outside of tensor-parallel layers.
        dropout_seed: seed of the dropout decisions.
    """

    mesh: Mesh = field(default_factory=Mesh.single)
    span: StageSpan | None = None
    sequence_parallel: bool = False
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dropout_seed: int = 0
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    @property
    def where(self) -> dict[str, Any]:
        """The arguments of a layer that say where its parameters lie."""
        return {"tp": self.mesh.tp, "device": self.device, "dtype": self.dtype}

    @property
    def partial(self) -> bool:
        """Whether a tensor-parallel rank sees a part of the sequence alone, outside of tensor-parallel layers."""
        return self.sequence_parallel and self.mesh.tp.size > 1


class Stream(NamedTuple):
    """The residual stream between two blocks: ``residual + dropout(branch)``, where the last sum is yet to be made.

    The next norm makes it in its own pass over memory.

    Attributes:
        branch: the output of the last sub-layer; None: the sum is made.
        row_keys: of the branch's dropout; None: nothing of it is dropped.
        offer: of the linear layer that gave the branch, if one did.
    """

    residual: Tensor
    branch: Tensor | None = None
    row_keys: Tensor | None = None
    offer: BiasOffer | None = None

    def sum(self, p: float) -> Tensor:
        return self.residual if self.branch is None else dropout_add(self.branch, self.residual, p, self.row_keys)

    def normed(self, norm: Norm | None, p: float) -> tuple[Tensor, Tensor]:
        """``norm`` of the stream, and the stream as it is."""
        if norm is None or self.branch is None:
            x = self.sum(p)
            return _normed(norm, x), x
        return norm(self.branch, self.residual, p, self.row_keys, self.offer)


class Block(nn.Module):
    """Block ``index`` of a model.

    ``config.norm_position`` says where the norms are, ``config.residual`` whether the MLP follows the attention or
    stands beside it. Dropout sites are ``site`` (attention output), ``site + 1`` (MLP output) and ``site + 2``
    (probabilities), behind that of the embedding.
    """

    def __init__(self, config: ModelConfig, index: int, settings: StageSettings):
        super().__init__()
        c, s, name = config, settings, f"layers.{index}"
        self.hidden_dropout, self.site = c.hidden_dropout, 1 + index * SITES_A_BLOCK
        self.parallel = c.residual != "sequential"
        position = c.resolved["norm_position"]
        self.norm_last = position == "post"
        before, after = position != "output", position in ("output", "sandwich")

        def norm(title: str, there: bool) -> Norm | None:
            if not there:
                return None
            return Norm(f"{name}.{title}", c.norm, c.hidden_size, **norm_settings(c), partial=s.partial, **s.where)

        self.attention_norm = norm("attention_norm", before and (c.first_norm or index > 0 or self.norm_last))
        self.attention = SelfAttention(
            f"{name}.attention",
            attention_config(c),
            site=self.site + 2,
            recompute_core=s.recompute.mode == "selective",
            sequence_parallel=s.sequence_parallel,
            **s.where,
        )
        self.attention_output_norm = norm("attention_output_norm", after)
        self.mlp_norm = norm("mlp_norm", before and c.residual != "parallel_one_norm")
        self.mlp = MLP(
            f"{name}.mlp",
            c.hidden_size,
            c.ffn_size,
            c.activation,
            bias=c.resolved["mlp_bias"],
            sequence_parallel=s.sequence_parallel,
            stds=(c.init_std, output_std(c.init_std, c.num_layers)),
            **s.where,
        )
        self.mlp_output_norm = norm("mlp_output_norm", after)

    def forward(self, stream: Stream, inputs: AttentionInputs, again: bool = False) -> Stream:
        """``again``: for what autograd keeps on the way; nobody looks at the result."""
        p = self.hidden_dropout
        if self.norm_last:
            return self._norm_last(stream.sum(p), inputs)
        normed, x = stream.normed(self.attention_norm, p)
        attended = self._after_attention(x, normed, inputs)
        if self.parallel:
            normed = normed if self.mlp_norm is None else self.mlp_norm(x)
            x = attended.sum(p)
        else:
            normed, x = attended.normed(self.mlp_norm, p)
        return self._after_mlp(x, normed, inputs, unused=again and self.mlp_output_norm is None)

    def _norm_last(self, x: Tensor, inputs: AttentionInputs) -> Stream:
        """``x = norm(x + attention(x))``, then ``x = norm(x + mlp(x))``."""
        x, _ = self._after_attention(x, x, inputs).normed(self.attention_norm, self.hidden_dropout)
        x, _ = self._after_mlp(x, x, inputs).normed(self.mlp_norm, self.hidden_dropout)
        return Stream(x)

    def _after_attention(self, x: Tensor, normed: Tensor, inputs: AttentionInputs) -> Stream:
        offer = BiasOffer()
        return self._stream(x, self.attention(normed, inputs, offer), self.attention_output_norm, offer, inputs, 0)

    def _after_mlp(self, x: Tensor, normed: Tensor, inputs: AttentionInputs, unused: bool = False) -> Stream:
        offer = BiasOffer()
        return self._stream(x, self.mlp(normed, offer, unused), self.mlp_output_norm, offer, inputs, 1)

    def _stream(
        self, x: Tensor, y: Tensor, norm: Norm | None, offer: BiasOffer, inputs: AttentionInputs, sub_layer: int
    ) -> Stream:
        """``x`` and the output ``y`` of a sub-layer, which may have a norm of its own."""
        keys = keys_of_rows(y, self.hidden_dropout, inputs.keys, self.site + sub_layer)
        return Stream(x, y, keys, offer) if norm is None else Stream(x, norm(y), keys)


class RecomputedBlock:
    """One call of a block under ``torch.utils.checkpoint``, from the sum of the stream, which is all that is kept.

    The forward pass calls it, and then the backward pass, for what the block's operators keep. There the last product
    is not computed, a fifth to a third of a block's: torch stops behind it, as nothing follows that keeps anything.
    """

    def __init__(self, block: Block, compiled: bool):
        self._block, self._compiled, self._called = block, compiled, False

    def __call__(self, x: Tensor, inputs: AttentionInputs) -> Stream:
        again, self._called = self._called and not self._compiled, True
        stream: Stream = self._block(Stream(x), inputs, again)
        return stream


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def norm_settings(c: ModelConfig) -> dict[str, Any]:
    """The arguments of every norm over the residual stream."""
    return {"eps": c.norm_eps, "bias": c.norm_bias, "zero_centered": c.zero_centered_norm}


def freed_for_loss(c: ModelConfig, tp: int, tokens: int, table: Tensor) -> int:
    """Bytes that the last block does not keep of its MLP's activation, where computing it again pays; else 0.

    The loss of a narrow model takes larger chunks for it, and each chunk reads and writes the whole main gradient of
    the ``table``, the output weight.
    """
    # In fp16, and where nothing is trained, the loss does not write the main gradient. ReLU keeps its result itself.
    written = table.requires_grad and hasattr(table, "main_grad") and table.dtype != torch.float16
    if not (on_gpu(table) and written) or c.activation == "relu":
        return 0
    freed = tokens * (c.ffn_size // tp) * table.itemsize
    traffic = (3 if c.gated else 2) * freed
    sizes = c.padded_vocab // tp, c.hidden_size
    return freed if traffic_spared(tokens, sizes, table.dtype, c.logit_softcap, freed) > traffic else 0


def attention_config(c: ModelConfig) -> AttentionConfig:
    """The sizes of the model's self-attention."""
    return AttentionConfig(
        c.hidden_size,
        c.num_kv_heads,
        c.queries_per_kv_head,
        c.head_size,
        bias=c.bias,
        qkv_bias=c.resolved["qkv_bias"],
        qk_norm=c.qk_norm_over if c.qk_norm else None,
        norm_eps=c.norm_eps,
        init_std=c.init_std,
        out_std=output_std(c.init_std, c.num_layers),
        zero_centered_norm=c.zero_centered_norm,
        rotary_interleaved=c.rotary_interleaved,
        score_scalar=c.attention_scalar,
    )
