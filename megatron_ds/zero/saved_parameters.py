"""Gathered parameters that autograd has saved for a backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_ds.zero.flat import FlatBucket


class _Saved:
    """A saved tensor of a graph; it is freed with the graph."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class SavedParameters:
    """Which of these gathered buckets an autograd graph needs: it has saved parameters of theirs, or views of them."""

    def __init__(self, buckets: Sequence[FlatBucket]):
        self._owner = {_storage(parameter): bucket for bucket in buckets for parameter in bucket.tensors}
        self._saved: dict[int, weakref.WeakSet[_Saved]] = {}  # by storage

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Context in which what autograd saves is noted."""

        def pack(tensor: Tensor) -> Tensor | _Saved:
            if (storage := _storage(tensor)) not in self._owner:
                return tensor
            saved = _Saved(tensor)
            self._saved.setdefault(storage, weakref.WeakSet()).add(saved)
            return saved

        with saved_tensors_hooks(pack, lambda saved: saved.tensor if isinstance(saved, _Saved) else saved):
            yield

    def alive(self) -> list[FlatBucket]:
        """The buckets that a graph still needs: a norm that was only printed needs none."""
        return [self._owner[storage] for storage, saved in self._saved.items() if saved]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
