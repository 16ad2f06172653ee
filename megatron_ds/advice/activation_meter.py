"""What recomputation saves in a user's model: bytes of activations, counted in one micro-batch.

Whatever a forward pass keeps for its backward passes through autograd's hooks on saved tensors. A part of the model
under ``torch.utils.checkpoint`` has hooks of its own, innermost, which drop what they are given; a hook on the modules
inside the part finds them there and puts a counter before them. With ``use_reentrant=True`` nothing is saved in the
forward pass at all, and the part is counted while the backward pass computes it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from megatron_ds.pipeline.stage import Activations

Hooks = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def recomputes(module: nn.Module) -> bool:
    """Whether some part says that it does, as those of ``transformers`` and ``diffusers`` do."""
    return any(getattr(part, "gradient_checkpointing", False) is True for part in module.modules())


class ActivationMeter:
    """Counts during the first forward pass in :meth:`forward` and the backward pass after it; then :meth:`result`."""

    def __init__(self, module: nn.Module):
        self._buffers = {buffer.untyped_storage().data_ptr() for buffer in module.buffers()}
        self._stored: dict[int, int] = {}  # bytes by storage
        self._alive: dict[int, StorageWeakRef] = {}  # the same: its memory may be another's in the backward pass
        self._recomputed: list[dict[int, int]] = []  # the same of each part that is computed again
        self._inside: list[nn.Module] = []
        self._open: list[Any] = []
        self._forward = self._used = False
        self._task: int | None = None  # autograd's number of the first backward pass
        self._hooks: list[Any] = []
        for part in module.modules():
            self._hooks.append(part.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._hooks.append(part.register_forward_hook(self._leave, always_call=True))

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        if self._used or not torch.is_grad_enabled():
            yield
            return
        self._used = self._forward = True
        with torch.autograd.graph.saved_tensors_hooks(self._store, lambda saved: saved):
            yield
        self._forward = False

    def result(self) -> Activations | None:
        """None if nothing was recomputed. Takes the hooks off the modules."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        sizes = [sum(part.values()) for part in self._recomputed]
        stored = sum(self._stored.values())
        return Activations(stored + sum(sizes), stored, max(sizes)) if any(sizes) else None

    def _store(self, saved: Any) -> Any:
        self._add(self._stored, saved)
        if type(saved) is Tensor and not saved.is_meta:
            storage = saved.untyped_storage()
            self._alive[storage.data_ptr()] = StorageWeakRef(storage)
        return saved

    def _is_stored(self, saved: Any) -> bool:
        ref = self._alive.get(saved.untyped_storage().data_ptr()) if type(saved) is Tensor else None
        return ref is not None and not ref.expired()

    def _add(self, where: dict[int, int], saved: Any) -> None:
        # Parameters are no activations, and neither are their transposes; stage 3 has them in other memory each time.
        if type(saved) is Tensor and not saved.is_meta and not isinstance(saved._base, nn.Parameter):
            storage = saved.untyped_storage()
            if storage.data_ptr() not in self._buffers:
                where[storage.data_ptr()] = storage.nbytes()

    def _enter(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inside or not self._used:
            return
        if not torch.is_grad_enabled():
            if self._forward:  # a reentrant part: its inputs stay
                self._inputs(args, kwargs)
                self._inside.append(part)
                self._open.append(contextlib.nullcontext())
            return
        top = _top_hooks()
        if self._forward:  # whoever has hooks above ours
            if top is None or getattr(top[0], "__self__", None) is self:
                return
            self._inputs(args, kwargs)
        else:  # the first backward pass, and who has none in it: those with hooks were counted
            task = torch._C._current_graph_task_id()
            if self._task is None:
                self._task = task if task != -1 else None
            if top is not None or task == -1 or task != self._task:
                return
        found: dict[int, int] = {}
        self._recomputed.append(found)
        pack, unpack = top or ((lambda saved: saved), (lambda saved: saved))

        def count(saved: Tensor) -> Any:
            if not self._is_stored(saved):
                self._add(found, saved)
            return pack(saved)

        counter = torch.autograd.graph.saved_tensors_hooks(count, unpack)
        counter.__enter__()
        self._inside.append(part)
        self._open.append(counter)

    def _inputs(self, args: Any, kwargs: Any) -> None:
        for leaf in tree_leaves((args, kwargs)):
            self._store(leaf)

    def _leave(self, part: nn.Module, args: Any, output: Any) -> None:
        if self._inside and self._inside[-1] is part:
            self._inside.pop()
            self._open.pop().__exit__(None, None, None)


def _top_hooks() -> Hooks | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
