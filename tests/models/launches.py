"""What one train step would launch on a GPU, counted without one: on the meta device, the way that CUDA goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ds.kernels import registry

# Kernels of one call, where it is more than one: cuDNN's and flash attention's backward pass has three; partial sums of
# squares are added up, those of rows that many tokens add to, and those over a sample's tokens; maxima of tiles are
# reduced.
KERNELS = {
    "_scaled_dot_product_flash_attention_backward": 3, "square_sum": 2, "add_rows_": 2, "float8_amax": 2,
    "modulated_norm_backward": 2, "scaled_add_backward": 2,
}  # fmt: skip
# Without a kernel: memory, and other looks at it.
NOTHING = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "lift_fresh",
    "set_", "resize_", "_reshape_alias", "is_same_size", "sym_size", "sym_stride",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"}


@dataclass
class Count:
    """Kernels by name, the bytes that they read and write, and how often the host waited for the device."""

    kernels: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    waits: int = 0

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())

    def __sub__(self, other: Count) -> Count:
        kernels = Counter(self.kernels)
        kernels.subtract(other.kernels)
        return Count(kernels, self.bytes - other.bytes, self.waits - other.waits)


class _Dispatched(TorchDispatchMode):
    def __init__(self, count: Count):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _run(func, args, kwargs or {})
        name = func._schema.name.split("::")[1]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        flat = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        on_device = any(t.is_meta for t in flat + results)
        if not on_device or name in NOTHING or (is_view and not written):
            return out
        # An operator that makes column sums has one more kernel, which adds up what its programs left.
        sums = any(a.name == "totals" and value for a, value in zip(func._schema.arguments, args))
        self.count.kernels[name] += KERNELS.get(name, 1) + sums
        # Each tensor once, also one that is read and written; one that is expanded for what it is.
        self.count.bytes += sum(_bytes(t) for t in {id(t): t for t in flat + results}.values())
        return out


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if func is torch.ops.aten.addmm.dtype_out:  # of which torch 2.11 has no version for the meta device
        return kwargs["out"]
    return func(*args, **kwargs)


def _bytes(t: Tensor) -> int:
    return t.itemsize * int(torch.Size(n for n, step in zip(t.shape, t.stride()) if step).numel())


class _Called(TorchFunctionMode):
    """Calls of torch that have no answer on the meta device: what waits gets ones, attention is flash attention."""

    def __init__(self, count: Count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITS and isinstance(args[0], Tensor) and args[0].is_meta:
            self.count.waits += 1
            return getattr(torch.ones(args[0].shape, dtype=args[0].dtype), name)()
        if name == "to" and args[0].is_meta and args[1:] == ("cpu",) and kwargs == {"non_blocking": True}:
            return torch.ones(args[0].shape, dtype=args[0].dtype)  # who waits for it waits for this copy alone
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            q, k, v = args[:3]
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, kwargs["is_causal"])[0]
        return func(*args, **(kwargs or {}))


class _Allocated(TorchDispatchMode):
    """The most bytes that tensors made inside had at one time, as a caching allocator without waste would count."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _run(func, args, kwargs or {})
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_meta(t)}
        for storage in (t.untyped_storage() for t in torch.utils._pytree.tree_leaves(out) if _is_meta(t)):
            if storage._cdata not in given:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: one for key, one in self._live.items() if not one[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._live.values()))
        return out


def _is_meta(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def most_bytes(run: Callable[[], object]) -> int:
    """Of what ``run`` allocates on the way that CUDA goes, at one time."""
    allocated = _Allocated()
    with registry.meta_as("cuda"), allocated:
        run()
    return allocated.most


def counted(run: Callable[[], object]) -> Count:
    count = Count()
    with ExitStack() as contexts:
        for context in (registry.meta_as("cuda"), _Called(count), _Dispatched(count)):
            contexts.enter_context(context)
        run()
    return count
