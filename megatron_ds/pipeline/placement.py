"""Placement: on which pipeline rank each stage of the model lives.

A *stage* is the global virtual one, ``0 .. num_stages - 1`` in the order in which the layers run. A rank holds
``chunks`` stages (model chunks; Narayanan et al. 2021, section 2.2.2, "interleaved schedule").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ds.errors import ConfigError

PlacementKind = Literal["looped", "v"]


@dataclass(frozen=True)
class Placement:
    """``ranks[stage]`` is the pipeline rank that holds a stage; ``pp`` the number of ranks."""

    pp: int
    ranks: tuple[int, ...]

    @staticmethod
    def looped(pp: int, chunks: int = 1) -> Placement:
        """Stages go round the ranks: 0, 1, 2, 0, 1, 2."""
        return Placement(pp, tuple(range(pp)) * chunks)

    @staticmethod
    def v(pp: int, chunks: int = 2) -> Placement:
        """Stages go to the last rank and back: 0, 1, 2, 2, 1, 0. The turning points hand over without a transfer, and
        with two chunks the first and the last stage share a rank (Qi et al. 2024, "Pipeline parallelism with
        controllable memory")."""
        there = tuple(range(pp))
        return Placement(pp, tuple(rank for chunk in range(chunks) for rank in (there[::-1] if chunk % 2 else there)))

    @staticmethod
    def of(kind: PlacementKind, pp: int, chunks: int) -> Placement:
        """The placement called ``kind``. Raises ConfigError for a number below 1."""
        for what, value in (("pp", pp), ("chunks", chunks)):
            if value < 1:
                raise ConfigError(f"{what}={value} is no pipeline; use at least 1")
        return Placement.v(pp, chunks) if kind == "v" else Placement.looped(pp, chunks)

    @property
    def num_stages(self) -> int:
        return len(self.ranks)

    @property
    def chunks(self) -> int:
        """Stages a rank holds."""
        return self.num_stages // self.pp

    def rank_of(self, stage: int) -> int:
        """The rank that holds a stage, which must exist."""
        return self.ranks[stage]

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank holds, in ascending order."""
        return [stage for stage, of in enumerate(self.ranks) if of == rank]

    def crosses(self, stage: int) -> bool:
        """Whether what flows between ``stage`` and ``stage + 1``, which must exist, changes rank."""
        return self.ranks[stage] != self.ranks[stage + 1]
