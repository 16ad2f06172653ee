"""How much a stage keeps from the forward to the backward pass of one micro-batch on one rank; a GPT's layers.

After Korthikanti et al. 2022 (arXiv 2205.05198), section 4: a layer keeps, in elements for each of the ``s b h``
places, 4 outside the tensor-parallel region (the inputs of two norms and two matmuls, which sequence parallelism alone
divides) and ``3 + 1 + 8`` within it (queries, keys, values, the attention's output, and the MLP's two of four times the
width). Where the code keeps other things than the paper's they are counted here as the code has them: dropout keeps no
masks with the kernels, as they are computed again; attention by blocks of queries keeps probabilities of short
sequences; the head keeps a gradient and no logits.

Shapes as in :mod:`.transformer`: ``s`` sequence, ``b`` micro-batch, ``h`` hidden, ``n`` heads, ``g`` key/value groups,
``d`` head dim, ``f`` features of the MLP; ``n``, ``g``, ``f`` divided over tp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_ds.config import BaseRunConfig, ModelConfig, RecomputeConfig, RunConfig
from megatron_ds.kernels.block_attention import block_size, is_preferred, keeps_probabilities
from megatron_ds.kernels.varlen_attention import takes_varlen
from megatron_ds.pipeline.stage import Activations, StageSpan

_DTYPES = (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp64", torch.float64))


def dtype_of(config: BaseRunConfig) -> torch.dtype:
    """Of the activations."""
    return dict(_DTYPES)[config.precision.dtype]


def width_of(config: BaseRunConfig) -> int:
    """Bytes of an element of the activations."""
    return dtype_of(config).itemsize


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one block keeps of a micro-batch.

    Attributes:
        no_recompute: all that autograd keeps.
        without_attention_core: the same without what the attention core keeps.
        attention_core_inputs: the queries, keys and values that the core is called with.
        input: the block's own input.
    """

    no_recompute: int
    without_attention_core: int
    attention_core_inputs: int
    input: int


def gpt_activations(config: RunConfig, span: StageSpan, tp: int, device: str) -> Activations:
    """Of the stage ``span`` over ``tp`` ranks on ``device`` (``"cpu"``, or ``"cuda"`` with its kernels)."""
    c, train, recompute = config.model, config.train, config.recompute
    places = train.micro_batch * train.sequence_length
    width = width_of(config)
    own = places // tp if config.mesh.sequence_parallel else places
    cpu = device == "cpu"
    layer = _layer(config, tp, cpu)
    layers = span.last - span.first
    fixed = 0
    windows = {c.has_window(index) for index in range(span.first, span.last)}
    if c.position == "rope":  # cos and sin, which the layers with a window share, and those without
        fixed += 2 * places * (c.rotary_dim or c.head_size) * width * max(1, len(windows))
    fixed += sum(_shared_bias(config, c.num_heads // tp, cpu, window) for window in windows)
    if span.embedding:
        fixed += (c.embedding_norm + (cpu and c.hidden_dropout > 0)) * own * c.hidden_size * width
    if span.head:
        # The last norm, and the gradient that the loss computes along with itself.
        fixed += norm_bytes(own, c.hidden_size, width, c.norm == "rmsnorm" and cpu) + places * c.hidden_size * width
    # The weight's goes straight into the main gradient; in fp16 it is kept, in fp32, until it has been scaled.
    loss = 0
    if span.head and config.precision.dtype == "fp16":
        loss = min(c.vocab_size, c.padded_vocab // tp) * c.hidden_size * 4
    fixed += loss
    return stage_activations(span.first, [layer] * layers, recompute, fixed, loss)


def stage_activations(
    first: int, layers: Sequence[LayerBytes], recompute: RecomputeConfig, fixed: int, loss: int = 0
) -> Activations:
    """Of a stage of these layers, of which the first has the number ``first``, and of what it keeps besides."""
    no_recompute = sum(layer.no_recompute for layer in layers) + fixed
    if recompute.mode == "selective":
        # Beside a fused core this can be more than without: its keys and values are copies, its arguments all of qkv.
        stored = sum(layer.without_attention_core + layer.attention_core_inputs for layer in layers) + fixed
        peak = max((layer.no_recompute - layer.without_attention_core for layer in layers), default=0)
        return Activations(no_recompute, stored, peak, loss)
    recomputed = [layer for index, layer in enumerate(layers, first) if recompute.whole_block(index)]
    spared = sum(layer.no_recompute - layer.input for layer in recomputed)
    peak = max((layer.no_recompute for layer in recomputed), default=0)
    return Activations(no_recompute, no_recompute - spared, peak, loss)


def _layer(config: RunConfig, tp: int, cpu: bool) -> LayerBytes:
    c, b, s = config.model, config.train.micro_batch, config.train.sequence_length
    width = width_of(config)
    places = b * s
    own = places // tp if config.mesh.sequence_parallel else places
    heads, groups = c.num_heads // tp, max(1, c.num_kv_heads // tp)
    row = places * c.head_size * width  # of one head
    stream = own * c.hidden_size * width
    before, after, inputs = _norms_and_inputs(c)
    around = (before + after) * norm_bytes(own, c.hidden_size, width, c.norm == "rmsnorm" and cpu) + inputs * stream
    if cpu and c.hidden_dropout:
        around += 2 * stream  # masks
    # gelu keeps its argument; a gate's product its two factors and the argument.
    features = 2 if not c.gated else (4 if cpu else 3)
    around += features * places * (c.ffn_size // tp) * width
    around += heads * row  # the core's output, the next matmul's input
    turned = c.position == "rope" or c.qk_norm  # queries and keys are not parts of qkv any more
    whole = (heads + 2 * groups) * row
    core_input = whole + (turned or groups < heads) * heads * row + turned * groups * row
    core, has_whole = _core(config, heads, groups, row, whole, core_input, cpu)
    no_recompute = around + core
    if c.qk_norm:
        normed = norm_bytes(places * (heads + groups), c.head_size, width, cpu)
        if not (cpu and width == 2):  # the arguments are qkv itself, and queries copied out of it
            normed += (groups < heads) * heads * row - (heads + groups) * row
            no_recompute += whole * (not has_whole)
        around, no_recompute = around + normed, no_recompute + normed
    return LayerBytes(no_recompute, around, core_input, stream)


def _core(
    config: RunConfig, heads: int, groups: int, row: int, whole: int, core_input: int, cpu: bool
) -> tuple[int, bool]:
    """Bytes that the attention core keeps besides its output, and whether all of qkv is among them."""
    c, b, s = config.model, config.train.micro_batch, config.train.sequence_length
    width = width_of(config)
    statistics = b * heads * s * (8 if cpu and width == 8 else 4)
    if c.attention.sparse.mode != "none":
        return core_input + statistics, True
    rules = c.position == "alibi" or config.data.document_masking or c.window is not None
    keeps = keeps_probabilities(s, c.head_size) and c.attention_softcap is None
    alone = c.attention_dropout > 0 or c.attention_softcap is not None
    if is_preferred(cpu, dtype_of(config), keeps, c.causal, rules or alone, alone):
        # Copies of queries, keys and values, and the probabilities of short rows. Documents make them fewer.
        block = block_size(torch.device("cpu" if cpu else "cuda"))
        seen = [min(start + block, s) if c.causal else s for start in range(0, s, block)]
        scores = sum(min(block, s - start) * keys for start, keys in zip(range(0, s, block), seen))
        return whole + (b * heads * scores * width if keeps else 0), False
    cut = config.data.document_masking or c.window is not None
    if takes_varlen(not cpu, width == 2, c.head_size, cut, c.position == "alibi"):
        # A batch of several rows is copied to have one row behind the other, and its output back.
        return (core_input + statistics, True) if b == 1 else (whole + heads * row + statistics, False)
    if groups < heads and not cpu and (rules or width > 2):
        return 3 * heads * row + statistics, False  # keys and values repeated for the queries
    # Where nothing turned them, queries or at least keys and values are parts of qkv, which stays as a whole.
    return core_input + statistics, True


def _norms_and_inputs(c: ModelConfig) -> tuple[int, int, int]:
    """Norms before layers and behind them, and how often the width of the stream stays as a matmul's input."""
    place = c.resolved["norm_position"]
    if c.residual == "parallel_one_norm":
        return 1, 0, 1
    if c.residual == "parallel":  # both norms keep the same argument
        return 1, 0, 2
    return {"pre": (2, 0, 2), "post": (2, 0, 2), "output": (0, 2, 2), "sandwich": (2, 2, 2)}[place]


def _shared_bias(config: RunConfig, heads: int, cpu: bool, window: bool) -> int:
    """Bytes of the bias on the scores that layers share: where a fused kernel has other rules than causality."""
    c, b, s = config.model, config.train.micro_batch, config.train.sequence_length
    alone = c.attention_dropout > 0 or c.attention_softcap is not None
    cut = config.data.document_masking or window
    if cpu or alone or not (c.position == "alibi" or cut):
        return 0
    if takes_varlen(True, width_of(config) == 2, c.head_size, cut, c.position == "alibi"):
        return 0
    shape = (heads if c.position == "alibi" else 1) * (b if config.data.document_masking else 1)
    return shape * s * s * width_of(config)


def norm_bytes(places: int, hidden: int, width: int, composed: bool) -> int:
    """A norm's argument and its statistics. torch composes RMSNorm on a CPU, which keeps a product too, in fp32."""
    return places * (hidden * (2 * max(width, 4) if composed else width) + (4 if composed else 8))
