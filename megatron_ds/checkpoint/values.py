"""Plain Python values as JSON, and back as they were given: the meta data of a checkpoint.

JSON knows dictionaries whose keys are strings, lists, and numbers that are finite. Everything else that comes back is
an object with one key, a tag that begins with ``$``: ``(1, 2)`` is ``{"$tuple": [1, 2]}``. No tag names code to run.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_ds.errors import CheckpointError

_MOST = 1 << 16  # elements of a tensor among plain values: a random generator's state, say

_SEQUENCES: dict[str, type] = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}
_MAPPINGS: dict[str, type] = {"$dict": dict, "$OrderedDict": OrderedDict, "$Counter": Counter}
_TAGS: dict[type, str] = {kind: tag for tag, kind in {**_SEQUENCES, **_MAPPINGS}.items()}


def encode(value: Any, name: str) -> Any:
    """``value`` as what ``json.dumps`` takes.

    Args:
        name: of the value, for errors.

    Raises:
        CheckpointError: it, or a part of it, would not come back as it is.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is float:
        return {"$float": repr(value)}
    if kind is list:
        return [encode(part, f"{name}[{place}]") for place, part in enumerate(value)]
    if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: encode(part, f"{name}[{key!r}]") for key, part in value.items()}
    tag = _TAGS.get(kind)
    if tag in _SEQUENCES:
        return {tag: [encode(part, f"{name}[{place}]") for place, part in enumerate(value)]}
    if tag in _MAPPINGS:
        pairs = [
            [encode(key, f"the key {key!r} of {name}"), encode(part, f"{name}[{key!r}]")] for key, part in value.items()
        ]
        return {tag: pairs}
    if kind is bytes:
        return {"$bytes": value.hex()}
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biuf" and value.size <= _MOST:
        tag = "$array" if kind is np.ndarray else "$number"
        return {tag: [value.dtype.str, encode(value.tolist(), name)]}
    if kind is torch.Tensor and not value.requires_grad and not value.is_complex() and value.numel() <= _MOST:
        values = encode(value.flatten().tolist(), name)
        return {"$tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), values]}
    what = f"a {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")
    if isinstance(value, torch.Tensor | np.ndarray):
        what += f" of shape {list(value.shape)}"
    raise CheckpointError(
        f"{name} is {what}, which JSON cannot hold, and a checkpoint runs no code when loaded; give numbers, strings, "
        f"lists, tuples, sets, dictionaries, and tensors of up to {_MOST} elements"
    )


def decode(value: Any) -> Any:
    """What was given to :func:`encode`; tensors are on the CPU.

    Raises:
        ValueError: a tag is unknown, or does not hold what it should.
    """
    if isinstance(value, list):
        return [decode(part) for part in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: decode(part) for key, part in value.items()}
    ((tag, held),) = value.items()
    if tag not in _DECODED:
        raise ValueError(f"a value is tagged {tag!r}, which this library does not know")
    try:
        return _DECODED[tag](decode(held))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"a value that is tagged {tag!r} is malformed: {error}") from None


def _tensor(held: list[Any]) -> torch.Tensor:
    dtype, shape, values = held
    return torch.tensor(values, dtype=getattr(torch, dtype)).reshape(shape)


_DECODED: dict[str, Callable[[Any], Any]] = {
    **_SEQUENCES,
    "$dict": dict,
    "$OrderedDict": OrderedDict,
    "$Counter": lambda pairs: Counter(dict(pairs)),
    "$float": float,
    "$bytes": bytes.fromhex,
    "$array": lambda held: np.array(held[1], dtype=np.dtype(held[0])),
    "$number": lambda held: np.dtype(held[0]).type(held[1]),
    "$tensor": _tensor,
}
