"""Run kernels under Triton's interpreter, which must be chosen before Triton decorates them: in a process of its own.

A file of cases has a dict ``CASES`` of name to function, imports nothing of Triton at its top, and can be collected
by pytest and run by :func:`run_cases` alike.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from interpreter_speed import speed_up
from torch import Tensor

NO_TRITON = "" if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"

CANARY_ELEMENTS = 4096
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def run_cases(file: str, seconds: float = 900.0) -> dict[str, str]:
    """Every case of the file, in one interpreted process: name to traceback, empty where it passed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, file]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(file: str) -> None:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    speed_up()
    sum_products_in_float64()
    results = {}
    for name, case in module.CASES.items():
        start = time.perf_counter()
        try:
            torch.manual_seed(0)
            case()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{time.perf_counter() - start:6.2f} s {name}", file=sys.stderr)
    print(json.dumps(results))


def sum_products_in_float64() -> None:
    """Round each sum of a product of tiles once: in fp32 its order is that of the BLAS at hand, which on some CPUs
    changes with the number of rows and exceeds what a GPU's sums lose."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if d.data.dtype != np.float32 or a.data.dtype.itemsize == 1:
            return original(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return TensorHandle(product.astype(np.float32), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


class Canaries:
    """Buffers with NaN before and after: a store there changes them, and no kernel may load from there either, not
    even what it does not use: on a GPU that is an illegal address, sooner or later."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.zones = np.empty((0, 2), np.uint64)  # addresses of the canaries, sorted: from, to

    def around(self, x: Tensor) -> Tensor:
        """A copy of ``x`` with its strides, in such a buffer; gaps between its elements are NaN too."""
        if not x.numel():
            return x.detach().clone()
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        buffer = self._buffer(span, x.dtype, x.device)
        view = buffer.as_strided(x.shape, x.stride(), CANARY_ELEMENTS)
        view.copy_(x)
        self._keep(buffer, view)
        return view

    def _buffer(self, span: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        canary = float("nan") if dtype.is_floating_point else (1 if dtype == torch.bool else -77)
        return torch.full((span + 2 * CANARY_ELEMENTS,), canary, dtype=dtype, device=device)

    def _keep(self, buffer: Tensor, view: Tensor) -> None:
        outside = torch.ones(buffer.shape, dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), CANARY_ELEMENTS).fill_(False)
        self.buffers.append((buffer, outside))
        size, start, end = buffer.element_size(), buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        zones = [(start, start + CANARY_ELEMENTS * size), (end - CANARY_ELEMENTS * size, end)]
        self.zones = np.array(sorted([*map(tuple, self.zones.tolist()), *zones]), np.uint64)

    def check(self) -> None:
        for buffer, outside in self.buffers:
            canaries = buffer[outside]
            untouched = canaries.isnan() if buffer.is_floating_point() else canaries.eq(canaries[0])
            assert untouched.all(), f"{(~untouched).sum()} stores outside of a buffer of {buffer.numel()}"

    @contextmanager
    def around_allocations(self) -> Iterator[None]:
        """What the launching functions allocate has canaries too."""

        def new_empty(like: Tensor, *size: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
            shape = original(torch.empty(0, device="meta"), *size).shape
            # Fake tensors of torch.compile and opcheck have no memory to guard.
            if not shape.numel() or type(like) is not Tensor or like.device.type != "cpu":
                return original(like, *size, dtype=dtype, **kwargs)
            buffer = self._buffer(shape.numel(), dtype or like.dtype, like.device)
            view = buffer[CANARY_ELEMENTS:-CANARY_ELEMENTS].view(shape)
            self._keep(buffer, view)
            return view

        def guarded(access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
            def wrapper(builder: Any, pointers: Any, *arguments: Any, **policy: Any) -> Any:
                touched = pointers.data[arguments[mask_at].data]
                # Zones do not overlap: an address is in one where more of them have begun than ended.
                starts, ends = self.zones.T
                outside = starts.searchsorted(touched, "right") > ends.searchsorted(touched, "right")
                assert not outside.any(), f"{access.__name__}: {outside.sum()} elements outside of their buffer"
                return access(builder, pointers, *arguments, **policy)

            return wrapper

        from triton.runtime.interpreter import InterpreterBuilder as Builder

        original = Tensor.new_empty
        with (
            patch.object(Tensor, "new_empty", new_empty),
            patch.object(Builder, "create_masked_load", guarded(Builder.create_masked_load, 0)),
            patch.object(Builder, "create_masked_store", guarded(Builder.create_masked_store, 1)),
        ):
            yield


def compare(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    tolerance: float | None = None,
    no_gradient: Sequence[int] = (),
) -> None:
    """The Triton twin of ``function(*inputs)`` against its reference in float64: outputs and all gradients.

    Floating-point inputs get gradients, except those numbered in ``no_gradient``. Errors are relative to the largest
    element of what is compared; the tolerance is that of the first input's dtype.
    """
    from megatron_ds.kernels import registry

    assert inputs[0] is not None
    tolerance = tolerance or TOLERANCE[inputs[0].dtype]
    canaries = Canaries()
    given = [None if x is None else canaries.around(x) for x in inputs]
    exact = [None if x is None else x.detach().double() if x.is_floating_point() else x for x in inputs]
    wanted = [i for i, x in enumerate(inputs) if x is not None and x.is_floating_point() and i not in no_gradient]
    for i in wanted:
        for tensors in (given, exact):
            tensor = tensors[i]
            assert tensor is not None
            tensor.requires_grad_()
    with registry.use("triton"), canaries.around_allocations():
        outputs = _tuple(function(*given))
        seeds = [canaries.around(torch.randn(y.shape).to(y.dtype)) for y in outputs]
        gradients = torch.autograd.grad(outputs, [given[i] for i in wanted], seeds)
    canaries.check()
    expected = _tuple(function(*exact))
    expected_gradients = torch.autograd.grad(expected, [exact[i] for i in wanted], [seed.double() for seed in seeds])
    names = [f"output {i}" for i in range(len(outputs))] + [f"gradient of input {i}" for i in wanted]
    for name, got, want in zip(names, [*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert got.shape == want.shape, f"{name}: {got.shape} and not {want.shape}"
        if want.numel():
            close(name, got, want, tolerance)


def close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    assert torch.equal(got.isinf(), want.isinf()) and not got.isnan().any(), f"{name} is not finite where it should be"
    finite = ~want.isinf()
    scale = max(want[finite].abs().max().item(), 1e-30) if finite.any() else 1.0
    error = (got.double() - want)[finite].abs().max().item() / scale if finite.any() else 0.0
    assert error <= tolerance, f"{name}: error {error:.2e} of {scale:.2e}, allowed {tolerance:.0e}"


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


if __name__ == "__main__":
    main(sys.argv[1])
