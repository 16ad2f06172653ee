"""The output projection and the cross entropy over a vocabulary split over tensor-parallel ranks, as one operation.

For a token with logits ``z``, target ``y``, vocabulary ``V``, smoothing ``e`` and z-loss weight ``w``::

    loss = (1 - e) (lse - z_y) + e (lse - mean(z)) + w lse^2,        lse = log sum exp z
    dz   = softmax(z) (1 + 2 w lse) - (1 - e) onehot(y) - e / V

The logits never exist as a whole: tokens are taken in chunks, and when gradients are wanted each chunk's are computed
at once, in place of its logits, and multiplied into the gradients of the hidden states and of the weight. The gradient
that comes into the backward pass is one number for the whole micro-batch. Where it is known beforehand (``seed``) the
logits' gradients are multiplied with it before they are rounded, and the weight's gradient goes straight into its main
gradient; else the backward pass scales what was kept.

Ranks exchange one packed message a chunk: (max, sum of exponentials, target logit, sum of logits) a token.
Padding rows of the weight take no part: they are sliced off before the matmul, so their gradient is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_ds import comm
from megatron_ds.kernels.accumulate import add_product
from megatron_ds.kernels.autograd import first_derivative_only, main_gradients
from megatron_ds.kernels.cross_entropy import (
    CROSS_ENTROPY,
    LossTerms,
    logit_gradient,
    losses_of,
    token_losses,
    token_statistics,
)
from megatron_ds.kernels.matmul import linear_input_gradient, linear_of_vocabulary
from megatron_ds.kernels.registry import on_gpu
from megatron_ds.mesh import Axis

# Tokens of a chunk: on a CPU so many that its logits take about these bytes and stay near the cache. On a GPU far more,
# as each chunk reads and writes the whole gradient of the weight: so many that this is 3% of the products' time. But
# only so many that the logits take no more than 256 MiB of them and what is not there because of it would: a gradient
# of the weight and a product of it, a gradient of the hidden states beside them, and what a model frees (see Logits).
CHUNK_BYTES = 16 << 20
GPU_CHUNK_TOKENS = 8192
GPU_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Logits:
    """What is done to ``hidden @ weight.T``, and what is known of the gradient.

    Attributes:
        bias: ``[v / tp]``, added.
        softcap: then they are ``softcap * tanh(logits / softcap)`` (Gemma 2, section 2).
        seed: 0-d, the gradient of the loss that the backward pass will be called with, where it follows at once: the
            weight's main gradient is then written with the loss already.
        overwrite: nobody else needs the hidden states: their gradient takes their place.
        freed: bytes that the model would keep until the backward pass, and does not: more logits may take them.
    """

    bias: Tensor | None = None
    softcap: float | None = None
    seed: Tensor | None = None
    overwrite: bool = False
    freed: int = 0


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    vocab_size: int,
    logits: Logits | None = None,
    tp: Axis,
    sequence_parallel: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum of the losses of the unmasked tokens, a scalar in fp32 (fp64 for fp64 inputs), equal on every rank.

    Args:
        hidden: ``[s(/tp), b, h]``.
        weight: ``[v / tp, h]``, this rank's rows of the padded table.
        labels: ``[s, b]`` int64 in ``0..vocab_size-1`` wherever ``loss_mask`` is True.
        loss_mask: ``[s, b]`` bool, True where the token counts.
        vocab_size: real tokens; rows of the global table beyond it are padding.
        logits: what they are besides ``hidden @ weight.T``.
    """
    given = Logits() if logits is None else logits
    _check_labels(labels, loss_mask, vocab_size)
    grad_enabled = torch.is_grad_enabled()
    # In fp16 the loss scale is in it: logits' gradients times that could leave the dtype's range.
    seed = None if hidden.dtype == torch.float16 else given.seed
    terms = LossTerms(label_smoothing, z_loss, vocab_size)
    rules = _Rules(terms, tp, weight.shape[0], grad_enabled, replace(given, seed=seed))
    return _LinearCrossEntropy.apply(hidden, weight, given.bias, labels, loss_mask, rules, sequence_parallel)


@dataclass(frozen=True)
class _Rules:
    """What a loss is of, and over which rows of the vocabulary.

    Attributes:
        rows: of the padded vocabulary on this rank.
        grad_enabled: inside an autograd function the grad mode is always off, and needs_input_grad does not know of it.
    """

    terms: LossTerms
    tp: Axis
    rows: int
    grad_enabled: bool
    logits: Logits = field(default_factory=Logits)

    @property
    def softcap(self) -> float | None:
        return self.logits.softcap

    def chunk(self, x: Tensor, accumulate: torch.dtype, spared: int) -> int:
        """Tokens of a chunk. By all rows of the table, not by those used, which differ: all ranks must cut alike.

        Args:
            x: ``[tokens, h]``.
            spared: gradients of the weight in ``accumulate`` that take no memory: see :func:`_weight_gradient`.
        """
        if not on_gpu(x):
            return max(16, CHUNK_BYTES // (self.rows * accumulate.itemsize))
        room = spared * self.rows * x.shape[1] * accumulate.itemsize + self.logits.overwrite * x.nbytes
        return _gpu_chunk(len(x), self.rows, x.itemsize, self.softcap, room + self.logits.freed)

    @property
    def first(self) -> int:
        """Number of this rank's first row."""
        return self.tp.rank * self.rows

    @property
    def used(self) -> int:
        """Rows of this rank that are no padding."""
        return min(max(self.terms.vocab_size - self.first, 0), self.rows)


def _gpu_chunk(tokens: int, rows: int, itemsize: int, softcap: float | None, room: int) -> int:
    """Tokens of a chunk on a GPU, a multiple of 256; ``room``: bytes that its logits may take besides."""
    token = rows * itemsize * (1 if softcap is None else 2)  # of a cap its slope is kept beside it
    most = max(256, min((GPU_CHUNK_BYTES + room) // token, GPU_CHUNK_TOKENS) // 256 * 256)
    chunks = max(1, -(-tokens // most))
    return -(-tokens // (chunks * 256)) * 256


def traffic_spared(tokens: int, table: tuple[int, int], dtype: torch.dtype, softcap: float | None, freed: int) -> int:
    """Bytes of the main gradient of a ``table [v / tp, h]`` that fewer chunks do not read and write on a GPU, where the
    logits may take ``freed`` bytes more: of a loss that knows its seed and overwrites the hidden states."""
    rows, width = table
    twice = 2 * rows * width * torch.promote_types(dtype, torch.float32).itemsize
    room = twice + tokens * width * dtype.itemsize
    chunks = [_gpu_chunk(tokens, rows, dtype.itemsize, softcap, room + more) for more in (0, freed)]
    many, few = (-(-tokens // max(1, chunk)) for chunk in chunks)
    return (many - few) * twice


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        loss_mask: Tensor,
        rules: _Rules,
        sequence_parallel: bool,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = (rules.grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        whole = comm.gather_dim0(hidden, rules.tp).wait() if sequence_parallel else hidden
        # Detached: a gradient in its place is no view that autograd knows.
        x = whole.detach().reshape(-1, whole.shape[-1])
        labels, mask = labels.reshape(-1), loss_mask.reshape(-1)
        table, shift = weight[: rules.used], None if bias is None else bias[: rules.used]
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        with _weight_gradient(weight, rules, accumulate, need_weight) as (add, grad_table, seed):
            # What sequence parallelism gathered is this function's own.
            own = rules.logits.overwrite or whole is not hidden
            grad_x = None if not need_hidden else x if own else torch.empty_like(x)
            grad_shift = torch.zeros_like(table[:, 0], dtype=accumulate) if need_bias else None
            total = torch.zeros((), dtype=accumulate, device=x.device)
            spared = 0 if add is None else 2 if grad_table is None else 1
            chunk = max(1, rules.chunk(x, accumulate, spared))
            for start in range(0, x.shape[0], chunk):
                part = slice(start, start + chunk)
                want_gradient = need_hidden or need_weight or need_bias
                logits = _logits(x[part], table, shift)
                loss, dz = _chunk(logits, labels[part], mask[part], rules, seed, want_gradient)
                del logits
                total += loss
                if dz is None:
                    continue
                if grad_shift is not None:
                    grad_shift += dz.sum(0, dtype=accumulate)
                dz = dz.to(x.dtype)
                if add is not None:
                    add(dz.t(), x[part])
                if grad_x is not None:  # last, as it may take the place of x
                    linear_input_gradient(dz, table, out=grad_x[part])
                del dz  # before the next chunk's logits
        ctx.shapes = (whole.shape, weight.shape)
        ctx.tp, ctx.sequence_parallel, ctx.used, ctx.dtype = rules.tp, sequence_parallel, rules.used, weight.dtype
        ctx.scaled, (ctx.main_grad,) = seed is not None, main_gradients(weight)
        ctx.save_for_backward(grad_x, grad_table, grad_shift)
        return total

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_table, grad_shift = ctx.saved_tensors
        (seed,) = grads
        pending = None
        if grad_x is not None:
            scaled = grad_x if ctx.scaled else (grad_x * seed).to(grad_x.dtype)
            scaled = scaled.view(ctx.shapes[0])
            pending = (
                comm.scatter_sum_dim0(scaled, ctx.tp)
                if ctx.sequence_parallel
                else comm.all_reduce_start(scaled, ctx.tp)
            )
        grad_weight = None
        if grad_table is not None and ctx.main_grad is not None:
            ctx.main_grad.add_scaled(grad_table, seed)
        elif grad_table is not None:
            grad_weight = grad_table.new_zeros(ctx.shapes[1], dtype=ctx.dtype)
            grad_weight[: ctx.used] = grad_table * seed
        grad_bias = None
        if grad_shift is not None:
            grad_bias = grad_shift.new_zeros(ctx.shapes[1][:1], dtype=ctx.dtype)
            grad_bias[: ctx.used] = grad_shift if ctx.scaled else grad_shift * seed
        return (pending.wait() if pending is not None else None, grad_weight, grad_bias, *[None] * 4)


_Add = Callable[[Tensor, Tensor], None]


@contextmanager
def _weight_gradient(
    weight: Tensor, rules: _Rules, accumulate: torch.dtype, needed: bool
) -> Iterator[tuple[_Add | None, Tensor | None, Tensor | None]]:
    """Where the products that make the weight's gradient are added up.

    Yields:
        What adds a product. The sum that is to be scaled in the backward pass; None where it is the main gradient. What
        the logits' gradients are to be multiplied with; None where the backward pass does so.
    """
    main_grad = getattr(weight, "main_grad", None)
    if not needed:
        yield None, None, rules.logits.seed
        return
    opened = None if rules.logits.seed is None or main_grad is None else main_grad.for_kernel()
    if opened is None or main_grad is None:
        # Summed over chunks in fp32: bf16 would lose what the later chunks add.
        total, holds = weight.new_empty((rules.used, weight.shape[1]), dtype=accumulate), False
    else:
        total, holds = opened[0][: rules.used], opened[1]
        if not holds:
            opened[0][rules.used :].zero_()

    def add(left: Tensor, right: Tensor) -> None:
        nonlocal holds
        add_product(total, left, right, not holds)
        holds = True

    yield add, total if opened is None else None, None if opened is None else rules.logits.seed
    if not holds:
        total.zero_()  # no token
    if opened is not None and main_grad is not None:
        main_grad.wrote()


def capped(logits: Tensor, softcap: float) -> Tensor:
    """``softcap * tanh(logits / softcap)``, in place."""
    return logits.div_(softcap).tanh_().mul_(softcap)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    *,
    vocab_size: int,
    tp: Axis,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The same loss of logits that are there already; **they are overwritten** (by their gradient, if one is wanted).

    Args:
        logits: ``[..., v / tp]``, this rank's columns of the padded vocabulary, contiguous.
        labels: ``[...]`` int64; ``ignore_index`` where the token does not count.
        loss_mask: ``[...]`` bool, True where the token counts; default: by ``ignore_index`` alone.
        vocab_size: real tokens; columns of the global vocabulary beyond it are padding.

    Returns:
        The sum over the tokens that count, as :func:`linear_cross_entropy`.
    """
    if not logits.is_contiguous():
        raise ValueError(f"logits of strides {logits.stride()} cannot be overwritten row by row; use .contiguous()")
    counts = labels != ignore_index
    mask = counts if loss_mask is None else counts & loss_mask
    _check_labels(labels, mask, vocab_size)
    terms = LossTerms(label_smoothing, z_loss, vocab_size)
    rules = _Rules(terms, tp, logits.shape[-1], torch.is_grad_enabled())
    return _CrossEntropy.apply(logits, labels, mask, rules)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, mask: Tensor, rules: _Rules) -> Tensor:
        used = rules.used
        rows = logits.detach().view(-1, logits.shape[-1])
        want_gradient = rules.grad_enabled and ctx.needs_input_grad[0]
        loss, gradient = _chunk(rows[:, :used], labels.reshape(-1), mask.reshape(-1), rules, None, want_gradient)
        if gradient is not None:
            # In half precision the reference computes in fp32 beside the logits; a kernel has left it here already.
            if gradient.data_ptr() != rows.data_ptr():
                rows[:, :used].copy_(gradient)
            rows[:, used:].zero_()
            ctx.save_for_backward(rows.view(logits.shape))
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], *[None] * 3


def _check_labels(labels: Tensor, mask: Tensor, vocab_size: int) -> None:
    """Raise RuntimeError where a label that counts is no token; on a GPU later, as an assertion there: none waits."""
    valid = (labels >= 0) & (labels < vocab_size)
    torch._assert_async(
        (valid | ~mask).all(),
        f"a label that counts is outside of 0..{vocab_size - 1}: set its loss_mask to False (or the label to "
        "ignore_index), or use data whose tokens fit model.vocab_size",
    )


def _chunk(
    logits: Tensor, labels: Tensor, mask: Tensor, rules: _Rules, seed: Tensor | None, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss sum of one chunk, and the gradient of its logits, times ``seed``, written over them.

    ``logits`` ``[t, used]`` of this rank's real rows; ``labels`` and ``mask`` ``[t]``.
    """
    tp, local, terms = rules.tp, labels - rules.first, rules.terms
    slope = None
    if rules.softcap is not None:
        slope = capped(logits, rules.softcap).div(rules.softcap).square_().neg_().add_(1.0)
    if tp.group is None and want_gradient:
        losses, gradient = token_losses(logits, local, mask, seed, terms)
        return losses.sum(), gradient if slope is None else gradient.mul_(slope)
    stats, scratch = token_statistics(logits, local, want_sum=terms.label_smoothing > 0.0)
    if tp.group is None:
        top, total, target, sum_of_logits = stats
    else:
        everyone = comm.gather_dim0(stats, tp).wait().view(tp.size, *stats.shape)
        top = everyone[:, 0].amax(dim=0)
        total = (everyone[:, 1] * (everyone[:, 0] - top).exp()).sum(dim=0)
        target, sum_of_logits = everyone[:, 2].sum(dim=0), everyone[:, 3].sum(dim=0)
    lse = top + total.log()
    loss = losses_of(lse, target, sum_of_logits, terms).masked_fill(~mask, 0.0).sum()
    if not want_gradient:
        return loss, None
    gradient = logit_gradient(scratch, stats[0], lse, local, mask, seed, terms)
    return loss, gradient if slope is None else gradient.mul_(slope)


def _logits(x: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ table.T + bias``, in rows that begin at multiples of 16 elements where a kernel is to load them."""
    if CROSS_ENTROPY.choose(x) == "reference":
        return linear_of_vocabulary(x, table, bias)
    rows = x.new_empty(x.shape[0], -(-table.shape[0] // 16) * 16)
    out = rows[:, : table.shape[0]]
    return torch.mm(x, table.t(), out=out) if bias is None else torch.addmm(bias, x, table.t(), out=out)
