"""The sections of a run's configuration: every field with its meaning, unit and default."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from megatron_ds.mesh import MOST_RANKS

Count = Annotated[int, Field(gt=0)]
_MOST = 1 << 53  # a whole number that a float and JSON still hold exactly
_MOST_LAYERS = 1 << 16  # and heads: what is made one by one


class _Section(BaseModel):
    """A section of settings. Every value is of its field's type (no true for 1, no "3" for 3), every number finite and
    every text something that can name a file: one rule, for all sections, files and command lines."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return value  # it checks its own
        if isinstance(value, bool) and get_origin(kind) is Literal and not any(v is value for v in get_args(kind)):
            raise ValueError(f"Input should be {' or '.join(map(repr, get_args(kind)))}")
        return _checked(value)


def _checked(value: Any) -> Any:
    """The value, its lists as tuples; an error for a number or a text in it that can mean nothing."""
    if isinstance(value, list | tuple):
        return tuple(_checked(item) for item in value)
    if isinstance(value, dict):
        return {name: _checked(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("Input should be a finite number")
    if isinstance(value, int) and abs(value) > _MOST:
        raise ValueError("Input should be at most 2^53 in size")
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("Input should not be empty" if not value else "Input should not contain a NUL character")
    return value


class SparseAttentionConfig(_Section):
    """Block-sparse attention: which blocks of the score matrix are computed. The same in every layer.

    The parameters, and their names, are those of DeepSpeed's sparse attention; a mode takes those that its description
    names and refuses the others. Blocks are counted in units of ``block`` tokens.
    """

    mode: Literal["none", "dense", "fixed", "variable", "bigbird", "bslongformer", "sliding_window"] = Field(
        "none", description="none: ordinary attention. dense: every block, to compare with."
    )
    block: Literal[16, 32, 64, 128] = Field(64, description="Tokens along a block's side; 64 and 128 suit Hopper.")
    different_layout_per_head: bool = Field(False, description="variable, bigbird: heads draw random blocks apart.")
    num_local_blocks: int = Field(4, gt=0, description="fixed: blocks of a local window.")
    num_global_blocks: int = Field(
        1,
        gt=0,
        description="fixed: blocks that stand for a window. bigbird: first blocks that see all and all see.",
    )
    num_different_global_patterns: int = Field(
        1, gt=0, description="fixed: heads take turns in which blocks of a window stand for it."
    )
    local_window_blocks: tuple[Count, ...] = Field((4,), description="variable: sizes of windows; the last repeats.")
    global_block_indices: tuple[int, ...] = Field((0,), description="variable, bslongformer: blocks that all see.")
    global_block_end_indices: tuple[int, ...] = Field(
        (), description="variable, bslongformer: ends of ranges that begin at global_block_indices."
    )
    num_random_blocks: int | None = Field(
        None, ge=0, description="variable, bigbird: random blocks a row of blocks. Default: 0, for bigbird 1."
    )
    num_sliding_window_blocks: int = Field(
        3,
        gt=0,
        description="sliding_window, bigbird, bslongformer: width of the band around the diagonal, odd; causal "
        "attention keeps its lower half.",
    )
    seed: int = Field(0, ge=0, description="variable, bigbird: random blocks follow from it, the head and the row.")


class AttentionConfig(_Section):
    """How attention is computed."""

    sparse: SparseAttentionConfig = SparseAttentionConfig()


class ModelConfig(_Section):
    """The transformer. One description covers GPT-2, GPT-3, Llama 2/3 and BLOOM, and BERT."""

    family: Literal["gpt", "bert"] = Field(
        "gpt",
        description="gpt: a decoder that predicts the next token. bert: an encoder that sees both ways and predicts "
        "masked tokens.",
    )
    num_layers: int = Field(12, gt=0, le=_MOST_LAYERS, description="Transformer blocks.")
    hidden_size: int = Field(768, gt=0, description="Width of the residual stream.")
    num_heads: int = Field(12, gt=0, le=_MOST_LAYERS, description="Query heads.")
    kv_heads: int | None = Field(
        None,
        gt=0,
        le=_MOST_LAYERS,
        description="Key/value heads; fewer than num_heads is grouped-query attention. Default: num_heads.",
    )
    head_dim: int | None = Field(None, gt=0, description="Width of one head. Default: hidden_size / num_heads.")
    ffn_hidden_size: int | None = Field(
        None,
        gt=0,
        description="Width inside the MLP. Default: 4 x hidden_size; gated 8/3 x, rounded up to 64.",
    )
    vocab_size: int = Field(50257, gt=0, description="Tokens of the tokenizer; ids are 0..vocab_size-1.")
    vocab_multiple: int = Field(
        128, gt=0, description="The embedding is padded to a multiple of this, which every tp must divide."
    )
    max_positions: int = Field(1024, gt=0, description="Longest sequence of learned positions, in tokens.")
    position: Literal["learned", "rope", "alibi", "none"] = Field("learned", description="How positions enter.")
    rope_theta: float = Field(10000.0, gt=0, description="Base wavelength of rotary embeddings.")
    rope_scaling: dict[str, float | int | str | bool] | None = Field(
        None,
        description="Llama 3.1 rotary scaling: factor, low_freq_factor, high_freq_factor, "
        "original_max_position_embeddings.",
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Normalisation layer.")
    norm_eps: float = Field(1e-5, gt=0, description="Added to the variance.")
    activation: Literal["gelu", "gelu_tanh", "swiglu", "geglu"] = Field(
        "gelu_tanh", description="MLP non-linearity; swiglu and geglu are gated, which makes three matrices of two."
    )
    bias: bool = Field(True, description="Biases in the linear layers.")
    qkv_bias: bool | None = Field(None, description="Bias of the query/key/value projection. Default: bias.")
    tied_embeddings: bool = Field(True, description="The output head is the token embedding.")
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys a head.")
    embedding_norm: bool = Field(False, description="LayerNorm after the embedding (BLOOM, BERT).")
    token_types: int = Field(0, ge=0, description="Rows of a table added by token type (BERT: 2); 0: none.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of initial weights.")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of attention probabilities.")
    hidden_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the embedding and of each block's outputs.")
    attention: AttentionConfig = AttentionConfig()

    @property
    def causal(self) -> bool:
        """Whether a token sees itself and those before it only."""
        return self.family == "gpt"

    @property
    def groups(self) -> int:
        """Key/value heads: the unit that tensor parallelism splits attention by."""
        return self.kv_heads or self.num_heads

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.groups

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its features by a gate."""
        return self.activation in ("swiglu", "geglu")

    @property
    def ffn_size(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64 if self.gated else 4 * self.hidden_size

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: a multiple that does not come from the mesh, so that layouts never depend on it."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class MeshConfig(_Section):
    """How many ranks along each axis; tp is kept inside a node."""

    tp: int = Field(1, gt=0, le=MOST_RANKS, description="Tensor-parallel ranks, which share each layer's matrices.")
    pp: int = Field(1, gt=0, le=MOST_RANKS, description="Pipeline stages: the layers are split over them.")
    cp: int = Field(1, gt=0, le=MOST_RANKS, description="Context-parallel ranks; only 1 for now.")
    dp: int | None = Field(
        None, gt=0, le=MOST_RANKS, description="Data-parallel replicas. Default: what the world size leaves."
    )
    sequence_parallel: bool = Field(
        True, description="Outside tensor-parallel layers split activations along the sequence over tp."
    )


class PipelineConfig(_Section):
    """When a stage does what."""

    schedule: Literal["1f1b", "gpipe"] = Field("1f1b", description="Order of forwards and backwards.")
    chunks: int = Field(1, gt=0, description="Stages (model chunks) a rank holds; above 1 with gpipe.")
    placement: Literal["looped", "v"] = Field(
        "looped", description="Where stages lie when a rank holds several: 0 1 2 0 1 2, or v: 0 1 2 2 1 0."
    )
    split: Literal["count", "cost"] = Field(
        "count", description="Layers a stage: evenly by count, or by cost with embedding and head counted."
    )
    layers_per_stage: tuple[Count, ...] | None = Field(None, description="Explicit split, e.g. 3 4 4 1, not split's.")


class OffloadConfig(_Section):
    """Where a part of the sharded state lives between its uses."""

    device: Literal["none", "cpu", "nvme"] = Field(
        "none", description="none: on the device. cpu: in host memory. nvme: in swap files under path."
    )
    path: str | None = Field(None, description="nvme: folder for the swap files, on a local disk of each node.")
    ratio: float = Field(
        1.0, ge=0, le=1, description="Share of the state, by elements and whole buckets, that goes there."
    )
    pin_memory: bool = Field(True, description="Page-locked host memory, for faster copies; CUDA only.")


class ZeroConfig(_Section):
    """Whose memory holds gradients, optimizer state and parameters."""

    stage: Literal[0, 1, 2, 3] = Field(
        1, description="Sharded over dp: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."
    )
    bucket_mb: float = Field(
        25.0, gt=0, description="MB of gradients reduced at a time, while the backward pass goes on."
    )
    overlap: bool = Field(
        True,
        description="Reduce buckets during the last backward pass, not after it; without it stages 2 and 3 keep whole "
        "gradients until its end.",
    )
    shard_size: int | None = Field(
        None, gt=0, description="Ranks over which state is sharded; beyond them it is repeated. Default: all of dp."
    )
    keep_whole: bool = Field(
        False,
        description="Stages 2, 3: whole gradients (and gathered weights) stay until the last micro-batch of a step.",
    )
    prefetch: int = Field(1, ge=0, description="Stage 3: units (blocks) gathered ahead of the one in use.")
    persistence_threshold: int = Field(
        10_000, ge=0, description="Stage 3: parameters with fewer elements than this stay whole on every rank."
    )
    offload_optimizer: OffloadConfig = OffloadConfig()
    offload_parameters: OffloadConfig = OffloadConfig()
    host_memory_mb: float | None = Field(
        None,
        gt=0,
        description="MB of host memory a rank that offload may take, staging buffers included. Default: what is free.",
    )


class OptimizerConfig(_Section):
    """The update rule. Learning rates are per step."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="torch's fused AdamW, or SGD with momentum.")
    lr: float = Field(3e-4, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = Field(
        "cosine", description="Shape of the decay after warm-up; wsd is warm-up, stable, decay."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from 0.")
    decay_steps: int | None = Field(None, gt=0, description="Step at which min_lr is reached. Default: train.steps.")
    wsd_decay_fraction: float = Field(0.1, gt=0, le=1, description="Share of decay_steps that wsd spends decaying.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="AdamW's denominator offset.")
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD's momentum.")
    weight_decay: float = Field(0.1, ge=0, description="Decay of matrices; biases and norms are never decayed.")
    clip_norm: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 turns clipping off.")


class PrecisionConfig(_Section):
    """Number formats. Gradients are always accumulated and master weights kept in fp32 (fp64 for fp64)."""

    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = Field("fp32", description="Format of weights and activations.")
    loss_scale: float | None = Field(None, gt=0, le=2.0**40, description="Fixed fp16 loss scale. Default: dynamic.")
    initial_loss_scale: float = Field(65536.0, gt=0, le=2.0**40, description="Where the dynamic loss scale starts.")
    loss_scale_window: int = Field(1000, gt=0, description="Good steps before the scale doubles.")
    loss_scale_hysteresis: int = Field(2, gt=0, description="Overflowing steps before the scale halves.")
    min_loss_scale: float = Field(1.0, gt=0, le=2.0**40, description="The scale never falls below this.")


class RecomputeConfig(_Section):
    """What the backward pass computes again instead of keeping."""

    mode: Literal["none", "selective", "full", "every_n"] = Field(
        "none", description="selective: the attention core; full: every block; every_n: every n-th block."
    )
    every: int = Field(2, gt=0, description="n of every_n.")


class FIMConfig(_Section):
    """Fill-in-the-middle: texts rearranged, so that the model learns to write what is missing inside them."""

    rate: float = Field(0.0, ge=0, le=1, description="Share of the documents that are rearranged; 0 for none.")
    spm_rate: float = Field(
        0.5, ge=0, le=1, description="Share of those in the order suffix, prefix, middle; the others: prefix, suffix."
    )
    tokens: tuple[str, str, str] | None = Field(
        None, description="The prefix, middle and suffix sentinels: special tokens of data.tokenizer."
    )


class DataConfig(_Section):
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
    test_blend: tuple[tuple[float, str], ...] = Field((), description="Beside train_blend: those kept for tests.")
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
    prefetch: int = Field(2, ge=0, description="Global batches read ahead by a background thread.")
    changed: Literal["refuse", "accept"] = Field(
        "refuse", description="What a run does that is resumed and finds other data than it was trained on."
    )


class TrainConfig(_Section):
    """How much, and in what portions."""

    steps: int = Field(1000, gt=0, description="Optimizer steps of the whole run.")
    global_batch: int = Field(8, gt=0, description="Sequences an optimizer step.")
    batch_ramp: tuple[Count, Count, Count] | None = Field(
        None,
        description="START INCREMENT SAMPLES: the batch grows from START to global_batch in equal parts of the first "
        "SAMPLES sequences.",
    )
    micro_batch: int = Field(1, gt=0, description="Sequences a forward pass on one replica.")
    sequence_length: int = Field(1024, gt=0, description="Tokens a sequence.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over the vocabulary.")
    z_loss: float = Field(0.0, ge=0, description="Weight of the squared log-partition penalty.")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0 for none.")
    eval_batches: int = Field(8, gt=0, description="Global batches an evaluation.")
    max_skipped_steps: int = Field(
        50, gt=0, description="Consecutive steps skipped for NaN or Inf gradients before the run is stopped."
    )


class CheckpointConfig(_Section):
    """What is written, when, and where a run starts from."""

    save_every: int = Field(0, ge=0, description="Steps between checkpoints; 0: only at the end.")
    save_at_end: bool = Field(True, description="Write a checkpoint after the last step.")
    keep_last: int | None = Field(
        None,
        gt=0,
        description="Older checkpoints are deleted, but for the newest that a good step followed. Default: keep all.",
    )
    resume: bool = Field(False, description="Continue from the latest checkpoint in output, if there is one.")
    resume_from: int | str | None = Field(
        None,
        description="Continue from another checkpoint, optimizer state and all: a step of output's, last-good (the "
        "newest of them whose every checksum is right), or a path.",
    )
    init_from: str | None = Field(
        None,
        description="Checkpoint of which a new run takes the weights (not the optimizer state) and the model's "
        "settings, e.g. an imported model.",
    )


class LogConfig(_Section):
    """What is shown and recorded."""

    every: int = Field(1, gt=0, description="Steps between lines and TensorBoard points.")
    tensorboard: bool = Field(True, description="Write TensorBoard events to output/tensorboard.")
    progress: bool = Field(True, description="Show a progress bar.")
    record_steps: tuple[Count, ...] = Field(
        (),
        description="Steps whose pipeline timeline is recorded to output/timeline for tools/show_schedule.py.",
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="Peak of one device for MFU. Default: a table of known GPUs; else no MFU."
    )


class RunConfig(_Section):
    """Pretrain a GPT-style model on any mesh of ranks."""

    output: str = Field("runs/gpt", description="Directory of checkpoints, logs and the resolved configuration.")
    seed: int = Field(1234, ge=0, description="Initial weights, sample order and dropout follow from it.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where every local rank has a GPU.")
    compile: bool = Field(False, description="torch.compile each block; on a CPU its activation.")
    kernels: Literal["auto", "reference", "triton"] = Field(
        "auto", description="Fused ops: auto is Triton on CUDA (not in fp64); reference is plain torch."
    )
    threads: int | None = Field(None, gt=0, description="CPU threads a rank. Default: cores / local ranks.")
    timeout: float = Field(600.0, gt=0, description="Seconds a collective may take before the job is stopped.")
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()
    zero: ZeroConfig = ZeroConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """Hash of every setting: ranks compare it before their first collective."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
