"""The sections of a run that trains a transformer on text, GPT or BERT, and what has to fit together in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from megatron_ds.config.cuda_graphs import cuda_graph_faults
from megatron_ds.config.data import data_faults
from megatron_ds.config.schema import (
    MOST_LAYERS,
    BaseDataConfig,
    BaseModelConfig,
    BaseRunConfig,
    BaseTrainConfig,
    Section,
)
from megatron_ds.config.sparse import AttentionConfig, sparse_faults
from megatron_ds.config.transformer import transformer_faults
from megatron_ds.config.unused import TEXT, unused_faults
from megatron_ds.mesh import MeshShape


class ModelConfig(BaseModelConfig):
    """The transformer. One description covers the decoders and encoders that `tools/convert.py` knows."""

    family: Literal["gpt", "bert"] = Field(
        "gpt",
        description="gpt: a decoder that predicts the next token. bert: an encoder that sees both ways and predicts "
        "masked tokens.",
    )
    hidden_size: int = Field(768, gt=0, description="Width of the residual stream.")
    num_heads: int = Field(12, gt=0, le=MOST_LAYERS, description="Query heads.")
    kv_heads: int | None = Field(
        None,
        gt=0,
        le=MOST_LAYERS,
        description="Key/value heads; fewer than num_heads is grouped-query attention; repeated where "
        "they are fewer than mesh.tp. Default: num_heads.",
    )
    head_dim: int | None = Field(None, gt=0, description="Width of one head. Default: hidden_size / num_heads.")
    ffn_hidden_size: int | None = Field(
        None,
        gt=0,
        description="Width inside the MLP. Default: 4 x hidden_size; gated 8/3 x, rounded up to 64.",
    )
    vocab_size: int = Field(
        50257, gt=0, description="Tokens of the tokenizer; ids are 0..vocab_size-1. Default: those of data.tokenizer."
    )
    vocab_multiple: int = Field(
        128, gt=0, description="The embedding is padded to a multiple of this, which every tp must divide."
    )
    max_positions: int = Field(1024, gt=0, description="Longest sequence of learned positions, in tokens.")
    position: Literal["learned", "rope", "alibi", "none"] = Field("learned", description="How positions enter.")
    alibi: Literal["exact", "rounded"] = Field(
        "exact",
        description="ALiBi's biases; rounded: to bf16, and divided by sqrt(head_dim) as scores are (Falcon-RW).",
    )
    position_offset: int = Field(
        0, ge=0, description="Row of the learned positions that the first token takes (OPT, RoBERTa: 2)."
    )
    rope_theta: float = Field(10000.0, gt=0, description="Base wavelength of rotary embeddings.")
    rope_scaling: dict[str, float | int | str | bool | tuple[float, ...]] | None = Field(
        None,
        description="Rotary scaling by transformers' names: rope_type (llama3, linear, dynamic, yarn, longrope), "
        "factor, ...",
    )
    rotary_dim: int | None = Field(None, gt=0, description="First dims of a head that are rotated. Default: all.")
    rotary_interleaved: bool = Field(
        False, description="Dims 2i and 2i + 1 turn together (GPT-J), not i and i + rotary_dim / 2."
    )
    window: int | None = Field(
        None, gt=0, description="Sliding window: a token sees those fewer places than this away. Default: all."
    )
    attention_pattern: tuple[Literal["window", "full"], ...] = Field(
        ("window",), description="Which layers have the window, repeated over the layers (Gemma 2: window full)."
    )
    window_rope_theta: float | None = Field(
        None, gt=0, description="rope_theta of the layers with a window, which have no rope_scaling then (Gemma 3)."
    )
    attention_scalar: float | None = Field(
        None, gt=0, description="Scores are divided by its square root. Default: head_dim."
    )
    attention_softcap: float | None = Field(None, gt=0, description="Scores are capped: c tanh(score / c) (Gemma 2).")
    logit_softcap: float | None = Field(None, gt=0, description="The same of the logits.")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Normalisation layer.")
    norm_eps: float = Field(1e-5, gt=0, description="Added to the variance.")
    norm_bias: bool = Field(True, description="LayerNorms have a bias.")
    zero_centered_norm: bool = Field(False, description="A norm's weight is kept as its difference from 1 (Gemma).")
    norm_position: Literal["pre", "post", "output", "sandwich"] | None = Field(
        None,
        description="pre: x + f(norm(x)). post: norm(x + f(x)). output: x + norm(f(x)) (OLMo 2). sandwich: both "
        "(Gemma 2). Default: pre; bert: post.",
    )
    first_norm: bool = Field(True, description="The first block has an attention norm (ModernBERT: none).")
    residual: Literal["sequential", "parallel", "parallel_one_norm"] = Field(
        "sequential",
        description="parallel: attention and MLP both take the block's input, each behind its norm (GPT-NeoX) or both "
        "behind one (GPT-J, Falcon).",
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_tanh"] = Field(
        "gelu_tanh", description="MLP non-linearity; swiglu and geglu are gated, which makes three matrices of two."
    )
    bias: bool = Field(True, description="Biases in the linear layers.")
    qkv_bias: bool | None = Field(None, description="Bias of the query/key/value projection. Default: bias.")
    mlp_bias: bool | None = Field(None, description="Biases of the MLP. Default: bias.")
    head_bias: bool | None = Field(None, description="Bias of the output head. Default: with bert, not with gpt.")
    tied_embeddings: bool = Field(True, description="The output head is the token embedding.")
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys.")
    qk_norm_over: Literal["head", "projection"] = Field(
        "head", description="qk_norm: each head's apart, or those of all heads at once (OLMo 2)."
    )
    embedding_norm: bool = Field(False, description="LayerNorm after the embedding (BLOOM, BERT).")
    embedding_scale: float = Field(1.0, gt=0, description="Factor of the token embedding (Gemma: sqrt(hidden_size)).")
    token_types: int = Field(0, ge=0, description="Rows of a table added by token type (BERT: 2); 0: none.")
    sentence_head: bool = Field(
        False,
        description="bert: a pooler and a next-sentence head, which have no loss here and stay as they are loaded.",
    )
    init_std: float = Field(0.02, gt=0, description="Standard deviation of initial weights.")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of attention probabilities.")
    hidden_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the embedding and of each block's outputs.")
    attention: AttentionConfig = AttentionConfig()

    @property
    def causal(self) -> bool:
        """Whether a token sees itself and those before it only."""
        return self.family == "gpt"

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads: the unit that tensor parallelism splits attention by."""
        return self.kv_heads or self.num_heads

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its features by a gate."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def ffn_size(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64 if self.gated else 4 * self.hidden_size

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: a multiple that does not come from the mesh, so that layouts never depend on it."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def position_rows(self) -> int:
        """Rows of the learned positions."""
        return self.max_positions + self.position_offset

    def has_window(self, layer: int) -> bool:
        return self.window is not None and self.attention_pattern[layer % len(self.attention_pattern)] == "window"

    @property
    def resolved(self) -> dict[str, Any]:
        one_theta = self.window is not None and self.position == "rope" and self.rope_scaling is None
        followed = {
            "kv_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "ffn_hidden_size": self.ffn_size,
            "rotary_dim": self.head_size,
            "window_rope_theta": self.rope_theta if one_theta else None,
            "attention_scalar": float(self.head_size),
            "norm_position": "pre" if self.causal else "post",
            "qkv_bias": self.bias,
            "mlp_bias": self.bias,
            "head_bias": not self.causal,
        }
        return {
            **self.to_dict(),
            "attention_pattern": list(shortest(["full", "window"][self.has_window(i)] for i in range(self.num_layers))),
            **{name: value for name, value in followed.items() if getattr(self, name) is None},
        }

    @property
    def free(self) -> frozenset[str]:
        positions = () if self.position == "learned" else ("max_positions",)
        return frozenset(("attention_dropout", "hidden_dropout", "init_std", "vocab_multiple", "attention", *positions))

    @property
    def growing(self) -> Mapping[str, str]:
        grown = {"vocab_size": "rows of new tokens are as the initialiser gives them"}
        if self.position == "learned":
            grown["max_positions"] = "rows of new positions are as the initialiser gives them"
        return grown


def shortest(layers: Iterable[str]) -> tuple[str, ...]:
    """The beginning of which all layers are repetitions, where it is short; else all of them."""
    kinds = tuple(layers)
    periods = (p for p in range(1, 65) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))
    return kinds[: next(periods, None)]


class FIMConfig(Section):
    """Fill-in-the-middle: texts rearranged, so that the model learns to write what is missing inside them."""

    rate: float = Field(0.0, ge=0, le=1, description="Share of the documents that are rearranged; 0 for none.")
    spm_rate: float = Field(
        0.5, ge=0, le=1, description="Share of those in the order suffix, prefix, middle; the others: prefix, suffix."
    )
    tokens: tuple[str, str, str] | None = Field(
        None, description="The prefix, middle and suffix sentinels: special tokens of data.tokenizer."
    )


class DataConfig(BaseDataConfig):
    """Where the tokens come from: one dataset (prefix), a blend of several, or a blend for each split."""

    prefix: str | None = Field(
        None, description="Path or URL (s3://, gs://, ...: any of fsspec) of the dataset, without .bin/.idx."
    )
    blend: tuple[tuple[float, str], ...] = Field(
        (), description="Several datasets: WEIGHT PREFIX WEIGHT PREFIX ..., by samples; each is divided by split."
    )
    train_blend: tuple[tuple[float, str], ...] = Field(
        (), description="Whole datasets that are trained on, as in blend; split is not used then."
    )
    valid_blend: tuple[tuple[float, str], ...] = Field((), description="Beside train_blend: those evaluated on.")
    test_blend: tuple[tuple[float, str], ...] = Field(
        (), description="Beside train_blend: those kept for tests; not opened."
    )
    split: str = Field("969,30,1", description="Weights of train, valid and test by tokens; cut between documents.")
    tokenizer: str | None = Field(None, description="Tokenizer folder; checked against the dataset, and exported.")
    synthetic: bool = Field(False, description="Random tokens instead of any dataset, for measuring speed.")
    document_masking: bool = Field(
        False, description="Attention and positions do not cross document boundaries in a packed sequence."
    )
    conversations: bool = Field(
        False, description="Whole conversations to a sequence, apart from each other; the loss counts answers alone."
    )
    fim: FIMConfig = FIMConfig()
    cache_dir: str | None = Field(
        None,
        description="Folder of the node for index caches and copies of remote datasets. Default: beside the data; "
        "for URLs ~/.cache.",
    )
    mask_token: int | None = Field(
        None, ge=0, description="bert: id in place of a masked token. Default: the tokenizer's [MASK]."
    )
    mask_probability: float = Field(
        0.15,
        gt=0,
        le=1,
        description="bert: chance of a token to be predicted. Of these 80% are masked, 10% are random, 10% stay.",
    )


class TrainConfig(BaseTrainConfig):
    """How much, in what portions, and the loss over the vocabulary."""

    sequence_length: int = Field(1024, gt=0, description="Tokens a sequence.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over the vocabulary.")
    z_loss: float = Field(0.0, ge=0, description="Weight of the squared log-partition penalty.")
    cuda_graphs: bool = Field(
        False,
        description="Record a micro-batch's forward and backward pass as CUDA graphs: one launch for all kernels. On "
        "one GPU; not measured yet.",
    )


class RunConfig(BaseRunConfig):
    """Pretrain a GPT-style model on any mesh of ranks."""

    output: str = Field("runs/gpt", description="Directory of checkpoints, logs and the resolved configuration.")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def faults(self, shape: MeshShape, needs_data: bool) -> Iterator[str]:
        yield from transformer_faults(self)
        yield from unused_faults(self, TEXT)
        yield from data_faults(self, needs_data)
        yield from sparse_faults(self)
        yield from cuda_graph_faults(self, shape)
