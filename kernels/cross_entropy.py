"""The two passes over a chunk of logits that a vocabulary-parallel cross entropy needs.

Between them the ranks that share the vocabulary exchange the four statistics of each token, one packed message a
chunk (see ``megatron_ds.layers.loss``, which also has the formulas). Shapes: ``t`` tokens, ``v`` this rank's real
vocabulary. The passes have no gradient: the loss computes its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ds.kernels.registry import Op, define

CROSS_ENTROPY = Op("cross_entropy", twin="cross_entropy")


class LossTerms(NamedTuple):
    """What a token's loss has besides the cross entropy, and the size of the whole vocabulary."""

    label_smoothing: float
    z_loss: float
    vocab_size: int


def token_statistics(logits: Tensor, target: Tensor, *, want_sum: bool) -> tuple[Tensor, Tensor]:
    """What a rank knows of each token, and a scratch tensor for :func:`logit_gradient`.

    Args:
        logits: ``[t, v]``; may be overwritten.
        target: ``[t]`` int64, the label's column here; anything outside ``0..v-1`` where another rank has it.
        want_sum: whether the sum of the logits is wanted (label smoothing).

    Returns:
        ``[4, t]``, fp32 (fp64 for fp64 logits): maximum, sum of ``exp(logit - maximum)``, logit of the target (0 where
        it is not here), sum of the logits (0 unless wanted).
    """
    if CROSS_ENTROPY.choose(logits) == "triton":
        return torch.ops.megatron_ds.token_statistics(logits, target, want_sum), logits
    return token_statistics_reference(logits, target, want_sum=want_sum)


def logit_gradient(
    scratch: Tensor, top: Tensor, lse: Tensor, target: Tensor, mask: Tensor, seed: Tensor | None, terms: LossTerms
) -> Tensor:
    """The gradient of each token's loss by its logits, ``[t, v]``, in place of ``scratch``.

    Args:
        scratch: from :func:`token_statistics`.
        top: ``[t]``, the first row of this rank's statistics.
        lse: ``[t]``, log of the sum of exponentials over the whole vocabulary.
        mask: ``[t]`` bool; rows of tokens that do not count are zero.
        seed: 0-d, what the gradient is multiplied with, before it is rounded to the dtype of the logits; None: 1.
    """
    if CROSS_ENTROPY.choose(scratch) == "triton":
        torch.ops.megatron_ds.logit_gradient_(scratch, lse, target, mask, seed, *terms)
        return scratch
    return logit_gradient_reference(scratch, top, lse, target, mask, seed, terms)


def token_statistics_reference(logits: Tensor, target: Tensor, *, want_sum: bool) -> tuple[Tensor, Tensor]:
    """The scratch is ``exp(logits - maximum)``, in place of fp32 logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    here = (target >= 0) & (target < logits.shape[1])
    stats = logits.new_zeros(4, logits.shape[0])
    stats[0].fill_(float("-inf"))
    if not logits.shape[1]:
        return stats, logits
    torch.amax(logits, dim=1, out=stats[0])
    stats[2] = logits.gather(1, target.masked_fill(~here, 0).unsqueeze(1)).squeeze(1).masked_fill(~here, 0.0)
    if want_sum:
        stats[3] = logits.sum(dim=1)
    # From here on the chunk holds exp(z - local max), and finally the gradient.
    # A rank whose logits are all -inf has a sum of 0: -inf minus -inf would be NaN.
    base = stats[0].masked_fill(stats[0] == float("-inf"), 0.0)
    torch.sub(logits, base.unsqueeze(1), out=logits).exp_()
    stats[1] = logits.sum(dim=1)
    return stats, logits


def logit_gradient_reference(
    scratch: Tensor, top: Tensor, lse: Tensor, target: Tensor, mask: Tensor, seed: Tensor | None, terms: LossTerms
) -> Tensor:
    label_smoothing, z_loss, vocab_size = terms
    if not scratch.shape[1]:
        return scratch
    here = (target >= 0) & (target < scratch.shape[1])
    weight = mask.to(scratch.dtype)  # of each token
    if seed is not None:
        weight = weight * seed.to(scratch.dtype)
    factor = (top - lse).exp()
    if z_loss:
        factor = factor * (1.0 + 2.0 * z_loss * lse)
    factor = (factor * weight).masked_fill(~mask, 0.0)  # a token that does not count may have any logits
    gradient = scratch.mul_(factor.unsqueeze(1))
    if label_smoothing:
        gradient.sub_(weight.unsqueeze(1) * (label_smoothing / vocab_size))
    hit = weight.masked_fill(~here, 0.0).mul(label_smoothing - 1.0)
    return gradient.scatter_add_(1, target.masked_fill(~here, 0).unsqueeze(1), hit.unsqueeze(1))


def losses_of(lse: Tensor, target_logit: Tensor, sum_of_logits: Tensor, terms: LossTerms) -> Tensor:
    """``[t]``, each token's loss, from what all ranks know of it together."""
    label_smoothing, z_loss, vocab_size = terms
    losses = lse - (1.0 - label_smoothing) * target_logit
    if label_smoothing:
        losses = losses - label_smoothing / vocab_size * sum_of_logits
    if z_loss:
        losses = losses + z_loss * lse.square()
    return losses


def token_losses(
    logits: Tensor, target: Tensor, mask: Tensor, seed: Tensor | None, terms: LossTerms
) -> tuple[Tensor, Tensor]:
    """Cross entropy and its gradient by the logits, where one rank has the whole vocabulary (tp = 1).

    The kernel reads a token's logits from memory once.

    Args:
        logits: ``[t, v]``; may be overwritten.
        seed: 0-d, what the gradient is multiplied with before it is rounded; None: 1.

    Returns:
        ``[t]`` losses in fp32 (fp64 for fp64 logits), 0 where ``mask`` is False; and the gradient by the logits.
    """
    if CROSS_ENTROPY.choose(logits) == "triton":
        return torch.ops.megatron_ds.token_losses_(logits, target, mask, seed, *terms), logits
    stats, scratch = token_statistics_reference(logits, target, want_sum=terms.label_smoothing > 0.0)
    lse = stats[0] + stats[1].log()
    losses = losses_of(lse, stats[2], stats[3], terms).masked_fill(~mask, 0.0)
    return losses, logit_gradient_reference(scratch, stats[0], lse, target, mask, seed, terms)


define(
    "token_statistics(Tensor logits, Tensor target, bool want_sum) -> Tensor",
    lambda logits, target, want_sum: CROSS_ENTROPY.load(logits).token_statistics(logits, target, want_sum),
    lambda logits, target, want_sum: logits.new_empty((4, logits.shape[0]), dtype=torch.float32),
)
define(
    "logit_gradient_(Tensor(a!) logits, Tensor lse, Tensor target, Tensor mask, Tensor? seed, float label_smoothing,"
    " float z_loss, int vocab_size) -> ()",
    lambda logits, *rest: CROSS_ENTROPY.load(logits).logit_gradient_(logits, *rest),
    lambda logits, *rest: None,
)
define(
    "token_losses_(Tensor(a!) logits, Tensor target, Tensor mask, Tensor? seed, float label_smoothing, float z_loss,"
    " int vocab_size) -> Tensor",
    lambda logits, *rest: CROSS_ENTROPY.load(logits).token_losses_(logits, *rest),
    lambda logits, *rest: logits.new_empty(logits.shape[0], dtype=torch.float32),
)
