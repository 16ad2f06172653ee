"""A collective or a transfer in flight, and the part of its result that is this rank's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_ds.mesh import Axis


class Pending:
    """Work in flight, a collective or a transfer: :meth:`wait` returns its result. On an axis of one rank it is done.

    ``then`` runs once, in the first :meth:`wait`, after all of ``work`` is done. ``result`` may be a function that
    gives the tensor: for what does not know its memory before it is waited for. One that raises is asked again by the
    next :meth:`wait`.
    """

    def __init__(
        self,
        result: torch.Tensor | Callable[[], torch.Tensor],
        work: dist.Work | Sequence[dist.Work | None] | None = None,
        then: Callable[[], object] | None = None,
    ):
        self.result = result
        self._work = (work,) if isinstance(work, dist.Work) else tuple(work or ())
        self._then = then

    def wait(self) -> torch.Tensor:
        for work in self._work:
            if work is not None:
                work.wait()
        self._work = ()
        if self._then is not None:
            then, self._then = self._then, None
            then()
        if not isinstance(self.result, torch.Tensor):
            self.result = self.result()
        return self.result


def slice_dim0(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's equal part of dim 0, as a view."""
    size = tensor.shape[0] // axis.size
    return tensor.narrow(0, axis.rank * size, size)
