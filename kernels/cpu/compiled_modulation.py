"""adaLN (adaptive layer norm) as Inductor graphs for a CPU: streams are read once forward, and once or twice backward.

Shapes: ``s`` sequence, ``b`` batch, ``h`` hidden; streams are ``[s, b, h]``, shifts, scales and gates ``[b, h]``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_ds.kernels.cpu.compiled_graph import compile_outputs, record

_SHAPES = 8
"""Of streams, for which graphs are made: each takes seconds."""


class CompiledModulation:
    """:class:`~megatron_ds.kernels.adaln.Operators` by graphs, one for each operator and kind of its inputs.

    Args:
        compiled: False leaves the graphs to be run operator by operator.
    """

    def __init__(self, compiled: bool = True):
        self._compiled = compiled
        self._shapes: set[torch.Size] = set()
        self._graphs: dict[tuple[object, ...], Callable[..., tuple[Tensor, ...]]] = {}

    def takes(self, stream: Tensor) -> bool:
        """Whether gradients are asked for, and there are graphs for streams like this one, or may be."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False
        if stream.shape not in self._shapes and len(self._shapes) < _SHAPES:
            self._shapes.add(stream.shape)
        return stream.shape in self._shapes

    def norm(
        self, x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor | None, gate: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        if branch is None or gate is None:
            return self.run(_norm, x, shift, scale, eps=eps)
        return self.run(_norm_of_sum, x, shift, scale, branch, gate, eps=eps)

    def norm_backward(self, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        given = [tensor for tensor in arguments if tensor is not None]
        return self.run(_norm_backward if len(given) < len(arguments) else _norm_of_sum_backward, *given)

    def scaled_add_backward(self, grad: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return self.run(_scaled_add_backward, grad, y, scale)

    def run(self, operator: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, eps: float = 0.0) -> tuple[Tensor, ...]:
        """What ``operator`` gives for ``inputs``, by its graph. ``eps``: for those that take one."""
        kind = operator, eps, *((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        graph = self._graphs.get(kind)
        if graph is None:
            graph = self._graphs[kind] = self._graph(partial(operator, eps=eps) if eps else operator, inputs)
        return graph(*inputs)

    def _graph(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
    ) -> Callable[..., tuple[Tensor, ...]]:
        graph = record(function, [tensor.detach() for tensor in inputs])
        return compile_outputs(graph, without="compile=False") if self._compiled else graph


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, and mean and reciprocal deviation of each row."""
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    out = centred * rstd * (1 + _wide(scale)) + _wide(shift)
    return out.to(torch.promote_types(x.dtype, scale.dtype)), mean, rstd


def _norm_of_sum(
    x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """And the sum, of whose rounded values the norm is."""
    summed = (_wide(x) + _wide(branch) * _wide(gate)).to(torch.promote_types(x.dtype, gate.dtype))
    return *_norm(summed, shift, scale, eps), summed


def _norm_gradients(
    grad: Tensor, d_x: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``x``, with ``d_x`` added, of shift and scale, in fp32 or wider."""
    wide, normed = _wide(grad), (_wide(x) - mean) * rstd
    d_normed = wide * (1 + _wide(scale))
    along = (d_normed * normed).mean(-1, keepdim=True)
    centred = d_normed - d_normed.mean(-1, keepdim=True) - normed * along
    return _wide(d_x) + centred * rstd, wide.sum(0), (wide * normed).sum(0)


def _norm_backward(
    grad: Tensor, d_x: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    d_x, d_shift, d_scale = _norm_gradients(grad, d_x, x, mean, rstd, scale)
    return d_x.to(x.dtype), d_shift.to(scale.dtype), d_scale.to(scale.dtype)


def _norm_of_sum_backward(
    grad: Tensor, d_x: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, branch: Tensor, gate: Tensor
) -> tuple[Tensor, ...]:
    d_x, d_shift, d_scale = _norm_gradients(grad, d_x, x, mean, rstd, scale)
    d_branch, d_gate = d_x * _wide(gate), (d_x * _wide(branch)).sum(0)
    of_norm = d_x.to(x.dtype), d_shift.to(scale.dtype), d_scale.to(scale.dtype)
    return *of_norm, d_branch.to(branch.dtype), d_gate.to(gate.dtype)


def _scaled_add_backward(grad: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    wide = _wide(grad)
    return (wide * _wide(scale)).to(y.dtype), (wide * _wide(y)).sum(0).to(scale.dtype)
