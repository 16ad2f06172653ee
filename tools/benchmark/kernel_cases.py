"""What `make bench-kernels` measures: every op at the shapes that people train, with the work that it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_ds.kernels import block_patterns
from megatron_ds.kernels.accumulate import add_rows
from megatron_ds.kernels.activation import bias_gelu, gated
from megatron_ds.kernels.adamw import AdamWNumbers, adamw_
from megatron_ds.kernels.block_layout import BlockLayout
from megatron_ds.kernels.cross_entropy import LossTerms, logit_gradient, token_losses, token_statistics
from megatron_ds.kernels.dropout import dropout_add
from megatron_ds.kernels.float8 import E4M3, Block, quantize_both
from megatron_ds.kernels.heads import split_heads
from megatron_ds.kernels.norm import add_norm, layer_norm, rms_norm
from megatron_ds.kernels.rotary import rotary
from megatron_ds.kernels.softmax import scaled_masked_softmax
from megatron_ds.kernels.sparse_attention import sparse_attention
from megatron_ds.kernels.square_sum import square_sum
from megatron_ds.layers.loss import linear_cross_entropy
from megatron_ds.mesh import Axis

DEVICE = "cuda"
BYTES, FLOPS = "GB/s", "TFLOP/s"
# The least that a kernel is to reach: of the measured copy rate, or in TFLOP/s for attention, by the first words of
# "op direction". Block-sparse attention is to reach its share of the dense layout's rate.
TARGETS: Mapping[str, float] = {
    "rms_norm forward": 0.90,
    "layer_norm forward": 0.90,
    "rms_norm backward": 0.80,
    "layer_norm backward": 0.80,
    "swiglu": 0.90,
    "softmax": 0.90,
    "cross_entropy": 0.85,
    "attention dense d=128 forward": 400.0,
    "attention dense d=128 backward": 280.0,
}
SPARSE_SHARE_OF_DENSE = 0.75


Peers = dict[str, Callable[[], Callable[..., Any]]]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        make: the inputs; those of floating point get gradients unless numbered in ``constant``.
        run: the op; its outputs are differentiated.
        forward, backward: bytes or, for matrix products, FLOPs that cannot be avoided; no backward: 0.
        unit: of the rate, GB/s or TFLOP/s.
        together: forward and backward are one call.
        in_place: the op writes over its inputs, which then are checked as they were made, rows aligned.
        peers: other implementations of the same, by name, made when they are to run. An op's reference is a peer of
            its own ("eager", "compile") unless ``eager`` is False.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], list[Tensor]]
    run: Callable[..., Any]
    forward: float
    backward: float
    constant: tuple[int, ...] = ()
    unit: str = BYTES
    together: bool = False
    in_place: bool = False
    peers: Peers = field(default_factory=dict)
    eager: bool = True


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)


def vectors(columns: int, *x: Tensor, dtype: torch.dtype, weights: int, keys: bool = False) -> list[Tensor]:
    """Rows of data, then per-column weights, then dropout keys a row."""
    rows = x[0].shape[0]
    more = [torch.randint(-(2**31), 2**31, (rows,), device=x[0].device).to(torch.int32)] if keys else []
    return [*x, *(normal(columns, dtype=dtype) for _ in range(weights)), *more]


def cases(dtype: torch.dtype, scale: int = 1) -> list[Case]:
    """The grid: hidden sizes from 1k to 16k, sequences of 1k to 64k. ``scale`` divides every size."""
    return [
        *streaming_cases(dtype, scale),
        *loss_cases(dtype, scale),
        *update_cases(dtype, scale),
        *attention_cases(dtype, scale),
    ]


def streaming_cases(dtype: torch.dtype, scale: int = 1) -> list[Case]:
    """Ops that are bound by memory: each input read once, each output written once."""
    size = dtype.itemsize
    found: list[Case] = []

    def add(op: str, shape: Sequence[int], make: Callable[[], list[Tensor]], run: Callable[..., Any],
            forward: float, backward: float, constant: tuple[int, ...] = ()) -> None:  # fmt: skip
        found.append(Case(op, "x".join(map(str, shape)), dtype, make, run, forward * size, backward * size, constant))

    for shape in ((16384, 1024), (8192, 4096), (8192, 8192), (8192, 12288), (4096, 16384), (262144, 128)):
        rows, columns = (max(2, side // scale) for side in shape)
        n = rows * columns

        def data(
            count: int, weights: int, keys: bool = False, rows: int = rows, columns: int = columns
        ) -> Callable[[], list[Tensor]]:
            return lambda: vectors(
                columns,
                *(normal(rows, columns, dtype=dtype) for _ in range(count)),
                dtype=dtype,
                weights=weights,
                keys=keys,
            )

        add("rms_norm", (rows, columns), data(1, 1), partial(rms_norm, eps=1e-5), 2 * n, 3 * n)
        add("layer_norm", (rows, columns), data(1, 2), partial(layer_norm, eps=1e-5), 2 * n, 3 * n)
        # A seam without dropout behind a layer with a bias, whose gradient its backward pass makes too.
        add("seam", (rows, columns), data(2, 3), seam, 4 * n, 4 * n)
        # Backward: two gradients and the sum in, two gradients out.
        add("add_norm", (rows, columns), data(2, 2, keys=True), dropped_add_norm, 4 * n, 5 * n)
        add("dropout_add", (rows, columns), data(2, 0, keys=True), dropped_add, 3 * n, 2 * n)
    for shape in ((8192, 4096), (8192, 14336), (4096, 28672)):
        rows, columns = (max(2, side // scale) for side in shape)
        n = rows * columns
        add("swiglu", (rows, 2 * columns), partial(one, rows, 2 * columns, dtype=dtype), gated, 3 * n, 5 * n)
        add("bias_gelu", (rows, columns), partial(with_bias, rows, columns, dtype), tanh_gelu, 2 * n, 3 * n)
    for length, heads in ((1024, 32), (2048, 32), (4096, 16), (8192, 4)):
        length = max(2, length // scale)
        heads = max(1, heads // scale)
        n = heads * length * length
        make = partial(one, 1, heads, length, length, dtype=dtype)
        add("softmax", (heads, length, length), make, partial(scaled_masked_softmax, scale=0.1), 2 * n, 3 * n)
        # Half of the square is read, all of it is written.
        causal = partial(scaled_masked_softmax, scale=0.1, causal=True)
        add("softmax causal", (heads, length, length), make, causal, 1.5 * n, 2 * n)
    for length, heads in ((8192, 32), (8192, 64)):
        length = max(2, length // scale)
        n = length * 2 * (heads + 8) * 128
        for name, interleaved in (("rotary", False), ("rotary interleaved", True)):
            run = partial(rotary, interleaved=interleaved)
            make = partial(queries_and_keys, length, heads, 8, dtype)
            add(name, (length, 2, heads + 8, 128), make, run, 2 * n, 2 * n, (2, 3))
        # Values are a view of the projection, until the gradients of all three are packed.
        make = partial(projection, length, 8, heads // 8, dtype)
        run = partial(heads_of, groups=8)
        add("heads", (length, 2, heads + 16, 128), make, run, 2 * n, 2 * (n + length * 2 * 8 * 128), (2, 3))
    return found


def update_cases(dtype: torch.dtype, scale: int = 1) -> list[Case]:
    """What has no gradient: the update, the norm of the gradients, rows of an embedding's, casts to FP8."""
    found, size = [], dtype.itemsize

    def add(op: str, shape: Sequence[int], make: Callable[[], list[Tensor]], run: Callable[..., Any],
            moved: float) -> None:  # fmt: skip
        found.append(Case(op, "x".join(map(str, shape)), dtype, make, run, moved, 0.0, tuple(range(9)), in_place=True))

    for count in (1 << 22, 1 << 27):
        count = max(2, count // scale**2)
        # Gradient, two moments and the weight read, all but the gradient written; and the weight in half precision.
        add("adamw", (count,), partial(weights, count, dtype), update, count * (28 + (2 * size if size < 4 else 0)))
        add("square_sum", (count,), partial(one, count, dtype=torch.float32), square_sum, 4 * count)
    for sides in ((8192, 768, 50304), (32768, 4096, 128256)):
        tokens, columns, vocabulary = (max(2, side // scale) for side in sides)
        make = partial(table_and_rows, tokens, columns, vocabulary, dtype)
        add("add_rows", (tokens, columns, vocabulary), make, added_rows, tokens * columns * (size + 8))
    for shape in ((8192, 4096), (8192, 14336)):
        rows, columns = (max(2, side // scale) for side in shape)
        n = rows * columns
        blocks = (("lines", Block(1, 128), 1), ("squares", Block(128, 128), 1), ("whole", Block(None, None), 2))
        for name, block, reads in blocks:
            make = partial(one, rows, columns, dtype=dtype)
            add(f"float8 {name}", (rows, columns), make, partial(cast, block=block), n * (reads * size + 2))
    return found


def loss_cases(dtype: torch.dtype, scale: int = 1) -> list[Case]:
    """Cross entropy of logits that are there, and with the projection that makes them."""
    found = []
    for tokens, vocabulary in ((8192, 32000), (8192, 50257), (8192, 131072)):
        tokens, vocabulary, hidden = (max(2, side // scale) for side in (tokens, vocabulary, 4096))
        make = partial(logits_and_labels, tokens, vocabulary, dtype)
        moved = 3.0 * tokens * vocabulary * dtype.itemsize
        peers: Peers = {"torch": lambda: torch_cross_entropy, "compile": partial(compiled, torch_cross_entropy)}
        found.append(
            Case("cross_entropy", f"{tokens}x{vocabulary}", dtype, make, cross_entropy, moved, 0.0, (0,),
                 together=True, in_place=True, peers=peers, eager=False)
        )  # fmt: skip
        # Of the whole vocabulary, whose logits are read from memory once.
        found.append(
            Case("token_losses", f"{tokens}x{vocabulary}", dtype, make, all_losses, moved * 2 / 3, 0.0, (0,),
                 together=True, in_place=True, peers=peers, eager=False)
        )  # fmt: skip
        make = partial(hidden_and_labels, tokens, hidden, vocabulary, dtype)
        work = 2.0 * tokens * hidden * vocabulary
        peers = {"torch": lambda: torch_linear, "compile": partial(compiled, torch_linear)}
        found.append(
            Case("linear_cross_entropy", f"{tokens}x{hidden}x{vocabulary}", dtype, make, fused_linear, work, 2 * work,
                 unit=FLOPS, together=True, peers=peers, eager=False)
        )  # fmt: skip
    return found


def attention_cases(dtype: torch.dtype, scale: int = 1) -> list[Case]:
    """Causal attention, 16k tokens in all (FlashAttention's convention) and one sequence of 64k. FLOPs are 4 d forward
    and 10 d backward a pair of tokens: those below the diagonal, in sparse layouts all of the live blocks. Blocks of
    128, FlexAttention's own."""
    found = []
    for head_dim, heads in ((128, max(4, 16 // scale)), (64, max(4, 32 // scale))):
        for length in (2048, 8192, 16384, 65536):
            block = 128 if scale == 1 else 16
            length = max(2 * block, length // scale)
            batch = max(1, 16384 // scale // length)
            for name in ("dense", "sliding_window", "bigbird"):
                if name == "dense" and length > 16384:
                    continue
                layout = block_patterns.PATTERNS[name](length, block, heads, causal=True)
                found.append(attention_case(name, layout, batch, max(1, heads // 4), head_dim, dtype))
    return found


def attention_case(name: str, layout: BlockLayout, batch: int, groups: int, head_dim: int, dtype: torch.dtype) -> Case:
    heads, length = layout.heads, layout.length
    if name == "dense":
        pairs = heads * length * (length + 1) / 2
    else:
        pairs = float(layout.live_blocks().sum()) * layout.block**2
    work = 4.0 * pairs * head_dim * batch
    peers: Peers = {"flex": partial(flex_of, name, layout)}
    if name == "dense":
        peers["sdpa"] = lambda: sdpa
    placed = layout.to(DEVICE)
    return Case(
        f"attention {name} d={head_dim}",
        f"{batch}x{heads}/{groups}x{length}",
        dtype,
        lambda: [normal(batch, n, length, head_dim, dtype=dtype) for n in (heads, groups, groups)],
        lambda q, k, v: sparse_attention(q, k, v, placed),
        work,
        2.5 * work,
        unit=FLOPS,
        peers=peers,
        eager=False,
    )


# --- the ops as they are called ---------------------------------------------------------------------------------


def one(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(*shape, dtype=dtype)]


def with_bias(rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(rows, columns, dtype=dtype), normal(columns, dtype=dtype)]


def queries_and_keys(length: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    q, k = normal(length, 2, heads, 128, dtype=dtype), normal(length, 2, groups, 128, dtype=dtype)
    angles = normal(length, 1, 1, 64, dtype=torch.float32).repeat(1, 1, 1, 2)
    return [q, k, angles.cos().to(dtype), angles.sin().to(dtype)]


def projection(length: int, groups: int, queries: int, dtype: torch.dtype) -> list[Tensor]:
    columns = groups * (queries + 2) * 128
    tables = queries_and_keys(length, 1, 1, dtype)[2:]
    return [normal(length, 2, columns, dtype=dtype), normal(columns, dtype=dtype), *tables]


def weights(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Master weights, gradient, moments, the gradient's factor, and the weights in half precision, if they are."""
    master = normal(count, dtype=dtype).float()
    gradient, mean, square = (normal(count, dtype=torch.float32) for _ in range(3))
    return [master, gradient, mean, square.square(), torch.ones((), device=DEVICE), master.to(dtype)]


def table_and_rows(tokens: int, columns: int, vocabulary: int, dtype: torch.dtype) -> list[Tensor]:
    rows = normal(tokens, columns, dtype=dtype)
    return [normal(vocabulary, columns, dtype=torch.float32), torch.randint(vocabulary, (tokens,), device=DEVICE), rows]


def logits_and_labels(tokens: int, vocabulary: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows begin at multiples of 16 elements, as layers/loss.py lays its logits out."""
    logits = normal(tokens, -(-vocabulary // 16) * 16, dtype=dtype)[:, :vocabulary]
    return [logits, torch.randint(vocabulary, (tokens,), device=logits.device)]


def hidden_and_labels(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> list[Tensor]:
    x, table = normal(tokens, 1, hidden, dtype=dtype), 0.02 * normal(vocabulary, hidden, dtype=dtype)
    return [x, table, torch.randint(vocabulary, (tokens, 1), device=x.device)]


def dropped_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, row_keys: Tensor) -> Any:
    return add_norm(x, residual, weight, bias, 1e-5, p=0.1, row_keys=row_keys)


def seam(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Any:
    return add_norm(x, residual, weight, bias, 1e-5, x_bias=x_bias)


def heads_of(qkv: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, groups: int) -> Any:
    return split_heads(qkv, groups, 128, (cos, sin), bias=bias)


def update(master: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, factor: Tensor, low: Tensor) -> Any:
    numbers = AdamWNumbers(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3)
    half = None if low.dtype == torch.float32 else low
    adamw_(master, gradient, mean, square, half, factor, numbers)
    return master, mean, square, low


def added_rows(table: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    add_rows(table, indices, rows)
    return table


def cast(x: Tensor, block: Block) -> Any:
    """As a layer's input and its transpose; with scales of powers of two, which round nothing but the casts do."""
    both = quantize_both(x, (None, None), block, E4M3, power_of_two=True)
    return tuple(part for of in both for part in (of.values, of.scale))


def dropped_add(x: Tensor, residual: Tensor, row_keys: Tensor) -> Tensor:
    return dropout_add(x, residual, 0.1, row_keys)


def tanh_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return bias_gelu(x, bias, "tanh")


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Loss and gradient in one, as training uses it: the gradient is written over the logits."""
    stats, scratch = token_statistics(logits, target, want_sum=False)
    lse = stats[0] + stats[1].log()
    mask = torch.ones(target.shape, dtype=torch.bool, device=target.device)
    return logit_gradient(scratch, stats[0], lse, target, mask, None, LossTerms(0.0, 0.0, logits.shape[1]))


def all_losses(logits: Tensor, target: Tensor) -> Any:
    mask = torch.ones(target.shape, dtype=torch.bool, device=target.device)
    return token_losses(logits, target, mask, None, LossTerms(0.0, 0.0, logits.shape[1]))


def fused_linear(x: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    mask = torch.ones_like(labels, dtype=torch.bool)
    return linear_cross_entropy(x, table, labels, mask, vocab_size=table.shape[0], tp=Axis("tp"))


# --- the peers --------------------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def torch_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The gradient of the summed losses by the logits, with torch's own loss."""
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(leaf.float(), target, reduction="sum"), leaf)[0]


def torch_linear(x: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, table).flatten(0, 1).float(), labels.flatten(), reduction="sum")


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flex_of(name: str, layout: BlockLayout) -> Callable[..., Any]:
    """FlexAttention of the same blocks; causal and band as its users write them, the others from the layout."""
    blocks, block = {"dense": layout.side, "sliding_window": 1}.get(name, -1), layout.block

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query // block - key // block <= blocks)

    mask: BlockMask
    if blocks < 0:
        mask = layout.to(DEVICE).to_block_mask()
    else:
        size = (layout.length, layout.length)
        mask = create_block_mask(allowed, None, None, *size, device=DEVICE, BLOCK_SIZE=block)
    return compiled(partial(flex_attention, block_mask=mask, enable_gqa=True))
