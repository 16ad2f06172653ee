"""What Triton's interpreter computes again at every operation, computed once: half of a case's time, and no check.

The interpreter takes the same path in Python for 8 elements as for 8,000, so a case costs what its operations cost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any


def speed_up() -> None:
    """Call it before the first launch."""
    _patch_language_once()
    _leave_out_unread_sums()
    _remember_types()
    _return_at_once()


def _patch_language_once() -> None:
    """Have the interpreter put its own functions in the place of Triton's once, for good.

    By itself it does so at every launch and every call of a helper in a kernel, which was most of a case's time.
    """
    from triton.runtime import interpreter

    class Kept:
        def restore(self) -> None:
            pass

    def once(function: Callable[..., Any]) -> Kept:
        modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules not in done:
            original(function)
            done.add(modules)
        return Kept()

    tl = interpreter.tl
    original, done = interpreter._patch_lang, set[frozenset[int]]()
    interpreter._patch_lang = once


def _leave_out_unread_sums() -> None:
    """Each sum of integers is computed again in int64 for an assertion that the interpreter never makes."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "the assertion is made"
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _remember_types() -> None:
    """What the types of blocks and of tensors hold for a shape, and numpy's dtype for one of Triton's."""
    from triton.language import core
    from triton.runtime import interpreter

    of_shapes: dict[tuple[int, ...], tuple[Any, ...]] = {}
    dtypes: dict[str, Any] = {}
    init_block_type, np_dtype = core.block_type.__init__, interpreter._get_np_dtype

    def shape_and_numel(sizes: Sequence[int]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        if sizes not in of_shapes:
            init_block_type(self, element_ty, shape)  # refuses sizes that are no powers of two
            of_shapes[sizes] = self.shape, self.numel, f"<{self.shape}", shape_and_numel(sizes)
        self.element_ty = element_ty
        self.shape, self.numel, name, self.of_tensors = of_shapes[sizes]
        self.name = f"{name}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else scalar

    def dtype_of(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = np_dtype(dtype)
        return dtypes[name]

    scalar = shape_and_numel(())
    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = block_type, tensor, dtype_of


def _return_at_once() -> None:
    """What needs no broadcast and no cast is known by its type being the very same object."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    equal, broadcast, cast = core.dtype.__eq__, TritonSemantic.broadcast_impl_value, TritonSemantic.cast

    def same(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    def broadcast_once(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
        return (left, right) if left.shape is right.shape else broadcast(self, left, right)

    def cast_once(self: Any, value: Any, dtype: Any, rounding: str | None = None) -> Any:
        return value if value.dtype is dtype else cast(self, value, dtype, rounding)

    core.dtype.__eq__ = same
    TritonSemantic.broadcast_impl_value, TritonSemantic.cast = broadcast_once, cast_once
