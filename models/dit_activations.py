"""How much a diffusion transformer keeps from the forward to the backward pass of one micro-batch on one rank.

In a block a stream keeps, for each place and element of the width, 6 numbers outside the tensor-parallel region: of
each of its two adaLN norms the normed and the modulated (a matmul's input), and what attention and MLP add, since gates
multiply it. Within the region it keeps queries, keys, values, what attention found and the MLP's features.

Shapes: ``b`` micro-batch, ``h`` hidden, ``n`` heads, ``d`` head dim, ``f`` features of the MLP.
"""

from __future__ import annotations

from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.kernels.block_attention import is_preferred, keeps_probabilities
from megatron_ds.models.activations import LayerBytes, dtype_of, stage_activations, width_of
from megatron_ds.pipeline.stage import Activations, StageSpan

DEVIATION = 4  # bytes a norm keeps of each place


def dit_activations(config: DiffusionRun, span: StageSpan, tp: int, device: str) -> Activations:
    """Of the stage ``span`` over ``tp`` ranks on ``device`` (``"cpu"`` or ``"cuda"``), of images of ``image_size``."""
    c, b, width = config.model, config.train.micro_batch, width_of(config)
    parts = tp if config.mesh.sequence_parallel else 1
    layers = [_layer(config, tp, device == "cpu", i == c.num_layers - 1) for i in range(span.first, span.last)]
    image, texts = b * c.patches // parts, b * c.text_tokens // parts * c.has_text
    fixed = 0
    if span.embedding:
        fixed += (image * c.patch_elements + texts * c.text_size) * width
    if span.head:
        # The last norm and what its matmul sees; errors, and noise levels' shares of them, in fp32 at least.
        fixed += 2 * image * c.hidden_size * width + image * DEVIATION
        fixed += image * c.patch_elements * max(width, 4) * (12 if c.learned_variance else 1)
    return stage_activations(span.first, layers, config.recompute, fixed)


def _layer(config: DiffusionRun, tp: int, cpu: bool, last: bool) -> LayerBytes:
    c, b, width = config.model, config.train.micro_batch, width_of(config)
    parts = tp if config.mesh.sequence_parallel else 1
    heads, gated = c.num_heads // tp, c.activation == "swiglu"
    features = (4 if cpu else 3) if gated else 2  # gelu keeps its argument, a gate's product its factors and argument
    around, stream = 0, b * c.hidden_size * width
    for length, whole in ((c.patches, True), *([(c.text_tokens, not last)] if c.has_text else [])):
        own = length // parts
        # Of a block behind which nobody reads the text: one norm, and no MLP.
        norm = 2 * own * stream + b * own * DEVIATION
        around += (2 * (norm + own * stream) if whole else norm) + (8 if whole else 3) * stream
        around += whole * features * b * length * (c.ffn_size // tp) * width
    row = b * c.tokens * heads * c.head_size * width  # of this rank's heads
    around += row  # what attention found, the next matmul's input
    core = 3 * row + b * heads * c.tokens * (8 if cpu and width == 8 else 4)
    keeps = keeps_probabilities(c.tokens, c.head_size)
    dense = c.attention.sparse.mode == "none"
    blocks = dense and is_preferred(cpu, dtype_of(config), keeps, causal=False, other_rules=False, alone=False)
    if blocks:  # copies of queries, keys and values, and the probabilities of short rows
        core = 3 * row + keeps * b * heads * c.tokens**2 * width
    # Queries and keys that are normed or turned are no parts of qkv, which stays whole: as what norms were applied to,
    # or for its values. Where two streams are put together all three are copies.
    inputs_of_core = 3 * row
    composed_of_copies = cpu and width == 2
    if c.qk_norm and c.has_text and not composed_of_copies:
        around += 3 * row
    elif (c.qk_norm or c.positions == "rope") and not c.has_text:
        around, inputs_of_core = around + 2 * row * (not blocks), inputs_of_core + 2 * row * blocks
    if c.qk_norm:
        around += 2 * b * c.tokens * heads * 4
        if cpu:  # torch composes RMSNorm of what fp32 makes of it, and keeps a product too
            around += 2 * row * max(width, 4) // width * (1 + composed_of_copies)
    inputs = (c.patches + c.text_tokens * c.has_text) // parts * stream
    return LayerBytes(around + core, around, inputs_of_core, inputs)
