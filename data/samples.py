"""What a run reads: samples by their place in it, whatever is in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy.typing as npt

Batch = dict[str, npt.NDArray]
"""Arrays by name, samples along dim 0; a family says which."""


class SampleSource(Protocol):
    """What a loader reads from: the samples of a run by their place in it.

    ``batch`` is given places in the *consumed order* (0 is the first sample of the run) and ``rows`` places in the
    *stored order* (``0 <= row < len(self)``); both return a :data:`Batch` in the order asked for.
    """

    def __len__(self) -> int: ...

    def batch(self, indices: npt.ArrayLike) -> Batch: ...

    def rows(self, rows: npt.ArrayLike) -> Batch: ...


LATENTS = "latents"
"""Of :attr:`Sources.identity`: the ``vae`` whose latents a model is trained on, with their ``scale`` and ``shift``, and
how its ``texts`` were encoded. Without it images are pixels. A run cannot go on with others: what its weights have
learnt would be about something else."""


Source = TypeVar("Source", bound=SampleSource)


@dataclass(frozen=True)
class Sources(Generic[Source]):
    """Samples of the splits that a run reads; None where one has no weight. ``notes``: what a run should say of them.

    ``identity``: what the order and the content of the samples follow from besides the seed, as JSON values.
    """

    train: Source
    valid: Source | None = None
    notes: tuple[str, ...] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)
