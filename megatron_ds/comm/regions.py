"""Collectives that autograd can go through, each forward beside its backward.

================================  ===================  ===================================
function                          forward              backward
================================  ===================  ===================================
:func:`reduce_from_region`        all-reduce           identity
:func:`sum_over_region`           all-reduce           all-reduce
:func:`reduce_scatter_sequence`   reduce-scatter dim 0 all-gather dim 0
:func:`gather_from_region`        all-gather dim 0     reduce-scatter dim 0
================================  ===================  ===================================
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_ds.comm.collectives import all_reduce, gather_dim0, scatter_sum_dim0
from megatron_ds.kernels.autograd import first_derivative_only
from megatron_ds.mesh import Axis


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        return all_reduce(tensor.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _SumOverRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return all_reduce(tensor.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.axis), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return scatter_sum_dim0(tensor, axis).wait()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_dim0(grads[0], ctx.axis).wait(), None


class _GatherFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return gather_dim0(tensor, axis).wait()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return scatter_sum_dim0(grads[0], ctx.axis).wait(), None


def reduce_from_region(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Leave a tensor-parallel region: the partial results of all ranks add up, and every rank has the sum."""
    return tensor if axis.group is None else _ReduceFromRegion.apply(tensor, axis)


def sum_over_region(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """A sum over all ranks inside a tensor-parallel region, where each rank goes on to use it in its own way."""
    return tensor if axis.group is None else _SumOverRegion.apply(tensor, axis)


def reduce_scatter_sequence(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[s, b, h] partial -> [s / tp, b, h]`` summed: enter a sequence-parallel region."""
    return tensor if axis.group is None else _ReduceScatterSequence.apply(tensor, axis)


def gather_from_region(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[n / tp, ...] -> [n, ...]``, whole on every rank, which uses it in its own way: the ranks' gradients add up."""
    return tensor if axis.group is None else _GatherFromRegion.apply(tensor, axis)
