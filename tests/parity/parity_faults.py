"""Deliberate faults: mistakes that parallel training code has made, each put into the running code by a patch.

Every fault of :data:`FAULTS` has a row on which it must show, and which passes without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from parity_rows import Row
from parity_run import Outcome, train_on_this_rank
from torch import Tensor

from megatron_ds import comm
from megatron_ds.comm.local.shared_buffers import LocalSlots
from megatron_ds.layers import attention, linear, loss, norms
from megatron_ds.mesh import Axis
from megatron_ds.models import transformer
from megatron_ds.optim.muon import MuonUpdate, orthogonalize
from megatron_ds.pipeline.action import Action
from megatron_ds.pipeline.executor import Executor
from megatron_ds.rng import DropoutKeys
from megatron_ds.shard import ShardSpec
from megatron_ds.train import build
from megatron_ds.train.step import TrainStep
from megatron_ds.zero import allocate
from megatron_ds.zero.flat import FlatBucket
from megatron_ds.zero.main_grad import MainGradient
from megatron_ds.zero.memory import TransientGradients, TransientParameters
from megatron_ds.zero.optimizer import ZeroOptimizer
from megatron_ds.zero.state import RegionAccess


@dataclass(frozen=True)
class Fault:
    row: Row
    patch: Callable[[], AbstractContextManager[Any]]
    shows_in: str  # what the failure message must say

    def __str__(self) -> str:
        return f"{self.patch.__name__}-{self.row.architecture}"


def train_with_faults(faults: Sequence[Fault], rows: Sequence[Row]) -> list[Outcome]:
    """Inside a job, all of one mesh: each fault's row with the fault in it, and then rows without any."""
    outcomes = []
    for fault in faults:
        with fault.patch():
            outcomes += train_on_this_rank([fault.row])
    return outcomes + train_on_this_rank(rows)


TP = Row((2, 1, 1), accumulation=2)
SP = Row((2, 1, 1), sequence_parallel=True, accumulation=2)
PP = Row((1, 2, 1), accumulation=2)
DP = Row((1, 1, 2), zero=1, accumulation=2)
LLAMA = Row((2, 1, 1), architecture="llama", tied=False, qk_norm=True)


def _with_comm(module: Any, **replaced: Any) -> AbstractContextManager[Any]:
    """``module`` sees another ``comm``, in which some functions are replaced; other modules do not."""
    return patch.object(module, "comm", SimpleNamespace(**{**vars(comm), **replaced}))


def no_forward_all_reduce() -> AbstractContextManager[Any]:
    return _with_comm(linear, all_reduce=lambda tensor, axis: tensor)


def no_backward_all_reduce() -> AbstractContextManager[Any]:
    return _with_comm(linear, all_reduce_start=lambda tensor, axis: comm.Pending(tensor))


def no_sequence_gather_backward() -> AbstractContextManager[Any]:
    """The loss returns each rank's own share of the hidden states' gradient instead of the sum over the vocabulary."""
    return _with_comm(
        loss, scatter_sum_dim0=lambda tensor, axis: comm.Pending(comm.slice_dim0(tensor, axis).contiguous())
    )


def gradient_doubled() -> AbstractContextManager[Any]:
    wrote = MainGradient.wrote

    def doubled(main_grad: MainGradient) -> None:
        if main_grad.name == "layers.1.mlp.up.weight":
            main_grad.view.mul_(2)
        wrote(main_grad)

    return patch.object(MainGradient, "wrote", doubled)


def norm_gradients_not_summed_over_tp() -> AbstractContextManager[Any]:
    replicated = norms.replicated_parameter

    def whole(name: str, shape: Any, init: Any, tp: Axis, partial: bool, **keywords: Any) -> Any:
        return replicated(name, shape, init, tp, False, **keywords)

    return patch.object(norms, "replicated_parameter", whole)


def bias_before_the_reduction() -> AbstractContextManager[Any]:
    def forward(layer: linear.RowParallelLinear, x: Tensor, *_: Any) -> Tensor:
        return comm.reduce_from_region(F.linear(x, layer.weight, layer.bias), layer.tp)

    return patch.object(linear.RowParallelLinear, "forward", forward)


def mean_of_micro_batch_means() -> AbstractContextManager[Any]:
    backward = Executor._backward

    def own_mean(executor: Executor, action: Action, grad: Tensor | None, run: Any) -> None:
        tokens = run.micro_batches[action.micro_batch]["loss_mask"].sum().clamp(min=1)
        right = run.seed
        run.seed = 1.0 / (tokens * len(run.micro_batches))
        backward(executor, action, grad, run)
        run.seed = right

    return patch.object(Executor, "_backward", own_mean)


def last_micro_batch_only() -> AbstractContextManager[Any]:
    """Gradients are overwritten, not accumulated."""
    start = ZeroOptimizer.start_backward

    def forget(zero: ZeroOptimizer, last: bool, stage: int) -> None:
        for main_grad in zero.reducer.main_grads():
            main_grad.written = False
        start(zero, last, stage)

    return patch.object(ZeroOptimizer, "start_backward", forget)


def tied_embedding_not_summed() -> AbstractContextManager[Any]:
    return patch.object(build, "_tie_embeddings", lambda stages, mesh: [])


def average_over_replicas() -> AbstractContextManager[Any]:
    finish = ZeroOptimizer.finish_gradients

    def averaged(zero: ZeroOptimizer) -> None:
        finish(zero)
        for flat_shard in zero.gradient_shards():
            flat_shard.data.div_(2)

    return patch.object(ZeroOptimizer, "finish_gradients", averaged)


def no_reduction_over_replicas() -> AbstractContextManager[Any]:
    return patch.object(
        allocate, "shard_axes", lambda mesh, config, over: (Axis("shard", ranks=(mesh.rank,)), Axis("replicate"))
    )


def no_gather_of_parameters() -> AbstractContextManager[Any]:
    return patch.object(FlatBucket, "start_gather", lambda bucket: None)


def replicas_counted_in_the_norm() -> AbstractContextManager[Any]:
    """Every tensor-parallel rank counts the norm weights and row biases that all of them hold."""

    def owned(*arguments: Any, replica: bool = False, **keywords: Any) -> ShardSpec:
        return ShardSpec(*arguments, **keywords)

    return patch.object(linear, "ShardSpec", owned)


def norm_of_the_own_stage() -> AbstractContextManager[Any]:
    """The clipping norm of each pipeline stage alone."""
    sum_over_world = TrainStep._sum_over_world

    def own(step: TrainStep, norm_squared: Tensor, loss_sum: Tensor, stop: bool) -> Tensor:
        summed = sum_over_world(step, norm_squared, loss_sum, stop)
        summed[0] = norm_squared
        return summed

    return patch.object(TrainStep, "_sum_over_world", own)


def smoothing_over_the_local_vocabulary() -> AbstractContextManager[Any]:
    chunk = loss._chunk

    def local(logits: Tensor, labels: Tensor, mask: Tensor, rules: Any, *others: Any) -> Any:
        terms = rules.terms._replace(vocab_size=logits.shape[1])
        return chunk(logits, labels, mask, replace(rules, terms=terms), *others)

    return patch.object(loss, "_chunk", local)


def positions_of_the_first_rank() -> AbstractContextManager[Any]:
    """Under sequence parallelism every rank takes the positions of the first part of the sequence."""
    return _with_comm(transformer, slice_dim0=lambda tensor, axis: tensor[: tensor.shape[0] // axis.size])


def dropout_by_local_position() -> AbstractContextManager[Any]:
    return patch.object(transformer, "DropoutKeys", lambda seed, samples, offset: DropoutKeys(seed, samples, 0))


def dropout_by_local_head() -> AbstractContextManager[Any]:
    rules = transformer.AttentionRules
    return patch.object(transformer, "AttentionRules", lambda **settings: rules(**{**settings, "first_head": 0}))


def dropout_by_local_sample() -> AbstractContextManager[Any]:
    return patch.object(
        transformer,
        "DropoutKeys",
        lambda seed, samples, offset: DropoutKeys(seed, torch.arange(len(samples), device=samples.device), offset),
    )


def slopes_of_the_first_heads() -> AbstractContextManager[Any]:
    slopes = transformer.alibi_slopes

    def local(num_heads: int) -> Tensor:
        return slopes(num_heads // 2).repeat(2)

    return patch.object(transformer, "alibi_slopes", local)


def stale_activation() -> AbstractContextManager[Any]:
    """The second stage uses the activation of micro-batch 0 again for micro-batch 1."""
    forward = Executor._forward
    kept: list[Tensor] = []

    def stale(executor: Executor, action: Action, hidden: Tensor | None, run: Any) -> None:
        if hidden is not None and action.micro_batch == 0:
            kept.append(hidden.clone())
        if hidden is not None and action.micro_batch == 1:
            hidden = kept.pop()
        forward(executor, action, hidden, run)

    return patch.object(Executor, "_forward", stale)


def gradient_of_another_micro_batch() -> AbstractContextManager[Any]:
    """The first stage applies the gradient that came back for micro-batch 0 to micro-batch 1 and the other way."""
    backward = Executor._backward
    early: list[tuple[Action, Tensor | None]] = []

    def swapped(executor: Executor, action: Action, grad: Tensor | None, run: Any) -> None:
        if executor.pp.rank == 0 and action.micro_batch == 0:
            early.append((action, grad))
        elif executor.pp.rank == 0 and action.micro_batch == 1:
            first, first_grad = early.pop()
            backward(executor, first, grad, run)
            backward(executor, action, first_grad, run)
        else:
            backward(executor, action, grad, run)

    return patch.object(Executor, "_backward", swapped)


def layer_dropped() -> AbstractContextManager[Any]:
    """The last stage leaves out its last layer."""
    hidden_states = transformer.Transformer.hidden_states

    def short(model: transformer.Transformer, micro_batch: Any, hidden: Tensor | None = None) -> Tensor:
        if model.span.head:
            last = str(model.span.last - 1)
            with patch.object(model.layers[last], "forward", lambda x, inputs: x):
                return hidden_states(model, micro_batch, hidden)
        return hidden_states(model, micro_batch, hidden)

    return patch.object(transformer.Transformer, "hidden_states", short)


def other_dropout_when_recomputed() -> AbstractContextManager[Any]:
    checkpoint = transformer.checkpoint

    def other(block: Any, x: Tensor, inputs: attention.AttentionInputs, **keywords: Any) -> Tensor:
        seeds = iter((inputs.keys.seed, inputs.keys.seed + 1))

        def run(x: Tensor, inputs: attention.AttentionInputs) -> Tensor:
            return block(x, replace(inputs, keys=replace(inputs.keys, seed=next(seeds))))

        return checkpoint(run, x, inputs, **keywords)

    return patch.object(transformer, "checkpoint", other)


def sharded_gradients_overwritten() -> AbstractContextManager[Any]:
    """Each micro-batch's reduction forgets those before it."""
    reduce = TransientGradients.reduce_scatter_start

    def forgetful(gradients: TransientGradients, *arguments: Any) -> Any:
        gradients.empty = True
        return reduce(gradients, *arguments)

    return patch.object(TransientGradients, "reduce_scatter_start", forgetful)


def own_slot_read_of_every_peer() -> AbstractContextManager[Any]:
    """A rank takes the slot that it uses itself for the one that its peer has written."""
    of_rank = LocalSlots.of_rank

    def own(slots: LocalSlots, rank: int, number: int, size: int) -> Tensor:
        return of_rank(slots, slots.arena.axis.rank, number, size)

    return patch.object(LocalSlots, "of_rank", own)


def stale_unit() -> AbstractContextManager[Any]:
    """A gather brings this rank's own slice and leaves the others' as they are in memory: zeros."""

    def own_slice_only(parameters: TransientParameters) -> comm.Pending:
        whole = parameters.take().zero_()
        comm.slice_dim0(whole, parameters.axis).copy_(parameters.shard)
        return comm.Pending(whole)

    return patch.object(TransientParameters, "all_gather_start", own_slice_only)


def offloaded_state_not_written_back() -> AbstractContextManager[Any]:
    release = RegionAccess.release
    return patch.object(RegionAccess, "release", lambda holding, changed: release(holding, False))


def hybrid_shards_not_summed_over_nodes() -> AbstractContextManager[Any]:
    return patch.object(FlatBucket, "sum_over_remaining_axes", lambda bucket: None)


def matrices_of_this_rank_alone() -> AbstractContextManager[Any]:
    """Newton-Schulz on a shard: an update of the right size in the wrong direction."""

    def alone(self: MuonUpdate, segments: Any, directions: Any) -> Any:
        for direction in directions:
            matrix = orthogonalize(direction.reshape(-1, direction.shape[-1]), 5, direction.dtype)
            yield matrix.view(direction.shape)

    return patch.object(MuonUpdate, "_orthogonal", alone)


FAULTS = (
    Fault(TP, no_forward_all_reduce, "loss of step 1"),
    Fault(TP, no_backward_all_reduce, "gradient norm of step 1"),
    Fault(SP, no_sequence_gather_backward, "gradient norm of step 1"),
    Fault(Row((2, 1, 1)), gradient_doubled, "in step 1: layers.1.mlp.up.weight"),
    Fault(SP, norm_gradients_not_summed_over_tp, "in step 1: layers.0.attention_norm.weight"),
    Fault(LLAMA, norm_gradients_not_summed_over_tp, "in step 1: layers.0.attention.q_norm.weight"),
    Fault(TP, bias_before_the_reduction, "loss of step 2"),
    Fault(PP, mean_of_micro_batch_means, "gradient norm of step 1"),
    Fault(DP, last_micro_batch_only, "gradient norm of step 1"),
    Fault(PP, tied_embedding_not_summed, "in step 1: embedding.weight"),
    Fault(DP, average_over_replicas, "gradient norm of step 1"),
    Fault(DP, no_reduction_over_replicas, "gradient norm of step 1"),
    Fault(DP, no_gather_of_parameters, "loss of step 2"),
    Fault(TP, replicas_counted_in_the_norm, "gradient norm of step 1"),
    Fault(PP, norm_of_the_own_stage, "gradient norm of step 1"),
    Fault(Row((2, 1, 1), smoothing=True), smoothing_over_the_local_vocabulary, "loss of step 1"),
    Fault(SP, positions_of_the_first_rank, "loss of step 1"),
    Fault(Row((2, 1, 1), sequence_parallel=True, dropout=True), dropout_by_local_position, "loss of step 1"),
    Fault(Row((2, 1, 1), dropout=True), dropout_by_local_head, "loss of step 1"),
    Fault(Row((1, 1, 2), dropout=True), dropout_by_local_sample, "loss of step 1"),
    Fault(Row((2, 1, 1), architecture="bloom"), slopes_of_the_first_heads, "loss of step 1"),
    Fault(Row((2, 1, 1), optimizer="muon"), matrices_of_this_rank_alone, "loss of step 2"),
    Fault(PP, stale_activation, "loss of step 1"),
    Fault(PP, gradient_of_another_micro_batch, "gradient norm of step 1"),
    Fault(PP, layer_dropped, "loss of step 1"),
    Fault(replace(DP, zero=2), sharded_gradients_overwritten, "gradient norm of step 1"),
    Fault(replace(DP, zero=2), own_slot_read_of_every_peer, "gradient norm of step 1"),
    Fault(replace(DP, zero=3), stale_unit, "loss of step 1"),
    Fault(Row((1, 1, 2), zero=1, offload="nvme"), offloaded_state_not_written_back, "loss of step 3"),
    Fault(Row((1, 1, 4), zero=2, hybrid=True), hybrid_shards_not_summed_over_nodes, "gradient norm of step 1"),
    Fault(Row((1, 1, 1), recompute="full", dropout=True), other_dropout_when_recomputed, "gradient norm of step 1"),
)
