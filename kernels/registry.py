"""Which implementation of an op runs: its plain-torch reference or its Triton twin.

Every op of this folder has one public function. It asks its :class:`Op` which implementation to take::

    SWIGLU = Op("swiglu", twin="activation")

    def swiglu(x: Tensor) -> Tensor:
        if SWIGLU.choose(x) == "triton":
            return torch.ops.megatron_ds.swiglu(x)
        return swiglu_reference(x)

The rule, and there is no other: a CUDA tensor in one of the op's dtypes takes Triton, anything else the reference,
unless :func:`use` says otherwise (or :func:`meta_as`, of tensors without memory). Nothing falls back: what was chosen
runs or raises, and :func:`report` tells what is chosen and why. The reference is the meaning of the op and
differentiable by autograd, in float64 too. Inside ``torch.compile`` it is taken where the compiler can fuse it
(``fuses``); another twin it keeps whole, as an operator of ``torch.library`` (:func:`define`). A twin's module is
imported when it first runs: importing this package needs no Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_ds.errors import ConfigError, nearest

NAMESPACE = "megatron_ds"
IMPLEMENTATIONS = ("auto", "reference", "triton")
# Where the ops are defined; `report` and `use` know an op by its module's Op objects.
MODULES = (
    "norm",
    "adaln",
    "dropout",
    "activation",
    "softmax",
    "cross_entropy",
    "rotary",
    "heads",
    "sparse_attention",
    "paged_attention",
    "square_sum",
    "float8",
    "accumulate",
    "adamw",
)


@dataclass(frozen=True)
class Op:
    """One op of the registry.

    Attributes:
        name: what :func:`use` and :func:`report` call it.
        twin: module below ``megatron_ds.kernels.triton`` with the Triton kernels.
        dtypes: what the twin computes with.
        fuses: inside ``torch.compile`` the reference is taken, which the compiler fuses with what stands around it.
    """

    name: str
    twin: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    fuses: bool = False

    def choose(self, x: Tensor) -> str:
        """``"triton"`` or ``"reference"`` for an input like ``x``; raises ConfigError for what cannot run."""
        wanted = _SELECTION.wanted(self.name)
        if wanted == "reference":
            return "reference"
        traced = self.fuses and torch.compiler.is_compiling()
        if wanted == "auto" and (traced or not on_gpu(x) or x.dtype not in self.dtypes):
            return "reference"
        self.check_dtype(x.dtype)
        return "triton"

    def check_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in self.dtypes:
            known = ", ".join(str(known) for known in self.dtypes)
            raise ConfigError(
                f"kernels.{self.name}='triton' cannot compute in {dtype}: it has {known}; use 'auto' or 'reference'"
            )

    def load(self, x: Tensor) -> ModuleType:
        """The twin's module, imported now; ``x`` is what it is to compute on."""
        return load_twin(self.name, self.twin, x.device.type)


@dataclass(frozen=True)
class Choice:
    """One line of :func:`report`: the op, what it takes, and the rule that said so."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.implementation} ({self.reason})"


class _Selection:
    """What :func:`use` and :func:`meta_as` have set. One for the process and not one a thread: the autograd engine
    recomputes checkpointed layers in threads of its own, which must choose as the forward pass did. ``torch.compile``
    guards on it."""

    def __init__(self) -> None:
        self.everywhere = "auto"
        self.by_op: Mapping[str, str] = {}
        self.meta = "meta"

    def wanted(self, op: str) -> str:
        return self.by_op.get(op, self.everywhere)


_SELECTION = _Selection()


def on_gpu(x: Tensor) -> bool:
    """Whether ``x`` takes a GPU's way: the fused kernels, and sums over tokens that come out in fp32."""
    return (_SELECTION.meta if x.is_meta else x.device.type) == "cuda"


@contextmanager
def meta_as(device_type: str) -> Iterator[None]:
    """Tensors on the meta device go the way of this device while the context lasts: what it would run can be counted
    without it."""
    before, _SELECTION.meta = _SELECTION.meta, device_type
    try:
        yield
    finally:
        _SELECTION.meta = before


@contextmanager
def use(selection: str | Mapping[str, str]) -> Iterator[None]:
    """Choose implementations while the context lasts: ``use("reference")``, or ``use({"norm": "reference"})``.

    The innermost context decides; ops that a mapping does not name keep what the outer one said. Raises ConfigError
    for an unknown op or implementation.
    """
    before = _SELECTION.everywhere, _SELECTION.by_op
    if isinstance(selection, str):
        _check("kernels", selection)
        _SELECTION.everywhere, _SELECTION.by_op = selection, {}
    else:
        check_selection(selection)
        _SELECTION.by_op = {**_SELECTION.by_op, **selection}
    try:
        yield
    finally:
        _SELECTION.everywhere, _SELECTION.by_op = before


def check_selection(selection: Mapping[str, str]) -> None:
    """Raise ConfigError where ``{op: implementation}`` names what does not exist."""
    names = [op.name for op in all_ops()]
    for name, wanted in selection.items():
        if name not in names:
            raise ConfigError(f"kernels.{name}: there is no such op, only {', '.join(names)}{nearest(name, names)}")
        _check(f"kernels.{name}", wanted)


def _check(what: str, wanted: str) -> None:
    if wanted not in IMPLEMENTATIONS:
        raise ConfigError(
            f"{what}={wanted!r} is not one of {', '.join(IMPLEMENTATIONS)}{nearest(wanted, IMPLEMENTATIONS)}"
        )


def all_ops() -> list[Op]:
    """Every op, in the order of :data:`MODULES`."""
    modules = [importlib.import_module(f"megatron_ds.kernels.{name}") for name in MODULES]
    found = (value for module in modules for value in vars(module).values() if isinstance(value, Op))
    return list(dict.fromkeys(found))  # a module may use another's op


def report(device: torch.device | str, dtype: torch.dtype) -> list[Choice]:
    """What each op takes for tensors of this device and dtype, and why."""
    device_type = torch.device(device).type
    choices = []
    for op in all_ops():
        wanted = _SELECTION.wanted(op.name)
        if wanted != "auto":
            choices.append(Choice(op.name, wanted, "as selected"))
        elif device_type != "cuda":
            choices.append(Choice(op.name, "reference", f"the device is {device_type}"))
        elif dtype not in op.dtypes:
            choices.append(Choice(op.name, "reference", f"the dtype is {dtype}"))
        else:
            choices.append(Choice(op.name, "triton", f"the device is {device_type}, the dtype {dtype}"))
    return choices


def check_runnable(device: torch.device | str, dtype: torch.dtype) -> None:
    """Raise ConfigError, before anything runs, where an op's choice for such tensors cannot run."""
    for op, choice in zip(all_ops(), report(device, dtype), strict=True):
        if choice.implementation == "triton":
            op.check_dtype(dtype)
            load_twin(op.name, op.twin, torch.device(device).type)


def load_twin(op: str, twin: str, device_type: str) -> ModuleType:
    """Import ``megatron_ds.kernels.triton.<twin>``; ConfigError where it cannot run on such a device."""
    way_out = "choose plain torch: kernels='reference'"
    try:
        triton = importlib.import_module("triton")
    except ModuleNotFoundError as error:
        raise ConfigError(f"kernels.{op}='triton' needs Triton: pip install triton, or {way_out}") from error
    module = importlib.import_module(f"megatron_ds.kernels.triton.{twin}")
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise ConfigError(
            f"kernels.{op}='triton' cannot run on a {device_type} tensor without TRITON_INTERPRET=1; {way_out}"
        )
    return module


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: type[torch.autograd.Function] | None = None,
) -> None:
    """Make ``torch.ops.megatron_ds.<name>`` of a schema such as ``"swiglu(Tensor x) -> Tensor"``.

    Args:
        run: the implementation for every device, below autograd; it loads the twin.
        fake: shapes, dtypes and strides of the results for fake inputs.
        autograd: its ``forward`` calls the same operator inside :func:`below_autograd`, its ``backward`` another one;
            None: the operator has no gradient.
    """
    name = f"{NAMESPACE}::{schema.split('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(name)(fake)
    if autograd is not None:
        torch.library.impl(name, "Autograd")(autograd.apply)


def below_autograd() -> Any:
    """Context in which an operator's own implementation is called, not its autograd function."""
    return torch._C._AutoDispatchBelowAutograd()
