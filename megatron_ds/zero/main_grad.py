"""Main gradients (``main_grad``): a parameter's part of a flat fp32 buffer, into which its gradient is added.

Autograd's way needs nothing of a layer: a hook moves ``param.grad`` over. A layer with a backward of its own can spare
that pass over memory and write into the buffer itself::

    main_grad = getattr(weight, "main_grad", None)   # in an autograd.Function's backward
    if main_grad is not None:
        main_grad.add_matmul(grad_output.flatten(0, -2).t(), input.flatten(0, -2))
        grad_weight = None                           # autograd is told there is nothing left to add
    else:
        grad_weight = grad_output.flatten(0, -2).t() @ input.flatten(0, -2)

Every way may be mixed for one parameter (a tied embedding gets the head's product and the rows of the lookup).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import torch

from megatron_ds.errors import EngineError, listed
from megatron_ds.kernels.accumulate import add_product, add_rows


class OwnBackward:
    """Tells the backward passes of one engine from those of others that reach its parameters.

    A generator's loss goes through the discriminator and leaves a gradient in each of its parameters. In a buffer it
    could not be told from the discriminator's own; so it is not kept, and noted.

    Attributes:
        strays: the parameters that got a gradient outside of :meth:`running`, by name, in order.
        failed: a pass ended in an error, and left the gradients of some parameters.
    """

    def __init__(self) -> None:
        self.strays: dict[str, None] = {}
        self._running = self.failed = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Gradients that come inside are the engine's own."""
        self._running = self.failed = True
        try:
            yield
            self.failed = False
        finally:
            self._running = False

    def fault(self) -> str | None:
        """What came from elsewhere, or not in full, and what to do; or None."""
        if self.failed:
            return (
                "a backward pass of this step ended in an error, and left the gradients of some parameters; call "
                "zero_grad() to drop the step's gradients, and begin with its first micro-batch again"
            )
        if not self.strays:
            return None
        return (
            f"{listed(self.strays, 1)} got gradients in a backward pass that was not this "
            "engine's: another engine's, or loss.backward(), which engine.backward(loss) replaces. They were not kept; "
            "call zero_grad() to go on without them, as with a discriminator through which the generator's loss went. "
            "Models that train on one loss belong in one engine, as an nn.ModuleDict"
        )

    def refuses(self, name: str) -> bool:
        if not self._running:
            self.strays[name] = None
        return not self._running


def is_trained(parameter: torch.Tensor) -> bool:
    """Whether it has a gradient buffer, and with it master weights and state; also while it is frozen."""
    return "main_grad" in parameter.__dict__


class MainGradient:
    """One parameter's gradient buffer and the count of writes into it.

    Args:
        name: for messages.
        before_write: called before a write while there is no buffer; it has to set ``view``.
        on_write: called after every write.

    Attributes:
        view: the parameter's part of the flat gradient buffer, in the parameter's shape; fp32, or fp64. None while
            the bucket has no buffer.
        written: whether the buffer holds anything yet: the first write overwrites, so that it need not be zeroed.
        used: whether anything was written in this step.
        writes: writes since the start of the backward pass that is to be reduced; ``expected``: how many it takes.
        own: if there, only gradients of its backward passes are kept.
        deferred: while a list, writes are appended to it and called later: where a schedule computes input gradients
            and weight gradients in actions of their own.
    """

    def __init__(
        self,
        name: str,
        before_write: Callable[[MainGradient], None],
        on_write: Callable[[MainGradient], None],
    ):
        self.name = name
        self.view: torch.Tensor | None = None
        self.written = self.used = False
        self.writes = 0
        self.expected = 0
        self.own: OwnBackward | None = None
        self.deferred: list[Callable[[], None]] | None = None
        self._before_write = before_write
        self._on_write = on_write

    def __reduce__(self) -> NoReturn:
        raise EngineError(
            f"{self.name} is trained by an engine, and torch.save(model) would write that too; save "
            "engine.state_dict(), or call engine.close() first"
        )

    def _keep(self, write: Callable[..., None], *operands: torch.Tensor) -> bool:
        """Whether the write is left for later, with its operands."""
        if self.deferred is None:
            return False
        self.deferred.append(partial(write, *(operand.detach() for operand in operands)))  # not the graph behind them
        return True

    def add(self, gradient: torch.Tensor) -> None:
        """Add a gradient of the parameter's shape, of any dtype."""
        if gradient.is_sparse:
            raise TypeError(f"{self.name} has a sparse gradient; flat buckets are dense: use sparse=False")
        if self._keep(self.add, gradient):
            return
        if (view := self._buffer()) is None:
            return
        if self.written:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        self.wrote()

    def add_matmul(self, left: torch.Tensor, right: torch.Tensor, add: Callable[..., None] = add_product) -> None:
        """Add ``left @ right`` (``[rows, k] @ [k, columns]``), where ``columns`` is the parameter's last dim.

        ``add(total, left, right, first)`` does it, see :func:`megatron_ds.kernels.accumulate.add_product`; another
        ``add`` may take its operands in another shape.
        """
        if self._keep(partial(self.add_matmul, add=add), left, right):
            return
        if (view := self._buffer()) is None:
            return
        add(view.view(-1, view.shape[-1]), left, right, not self.written)
        self.wrote()

    def add_rows(self, indices: torch.Tensor, rows: torch.Tensor) -> None:
        """Add ``rows[i]`` to row ``indices[i]`` of a 2-D parameter (``[n]``, ``[n, columns]``); indices may repeat.

        The dense gradient that autograd would make is as large as the table, and so is its addition.
        """
        if self._keep(self.add_rows, indices, rows):
            return
        if (view := self._buffer()) is None:
            return
        if not self.written:
            view.zero_()
        add_rows(view, indices, rows)
        self.wrote()

    def add_scaled(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
        """Add ``gradient * factor`` (a scalar) in one pass. Rows that ``gradient`` lacks at the end are zero."""
        if self._keep(self.add_scaled, gradient, factor):
            return
        if (view := self._buffer()) is None:
            return
        rows = view[: gradient.shape[0]]
        if self.written:
            rows.addcmul_(gradient, factor.to(rows.dtype))
        else:
            torch.mul(gradient, factor, out=rows)
            view[gradient.shape[0] :].zero_()
        self.wrote()

    def for_kernel(self) -> tuple[torch.Tensor, bool] | None:
        """For a kernel that adds the gradient itself: where, and whether to keep what is there (else overwrite it).

        After the launch comes :meth:`wrote`. None: not here and now; the gradient goes through :meth:`add`.
        """
        if self.deferred is not None or (view := self._buffer()) is None:
            return None
        return view, self.written

    def _buffer(self) -> torch.Tensor | None:
        """Where to write; None: nowhere, the gradient is another's."""
        if self.own is not None and self.own.refuses(self.name):
            return None
        if self.view is None:
            self._before_write(self)
            assert self.view is not None
        return self.view

    def wrote(self) -> None:
        """A write is done."""
        self.written = self.used = True
        self.writes += 1
        self._on_write(self)
