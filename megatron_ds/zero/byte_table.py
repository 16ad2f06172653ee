"""Memory of one rank: bytes by kind and place, and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STATE = ("master", "optimizer")
"""Kinds of bytes that ``offload_optimizer`` moves."""
KINDS = ("parameters", "gradients", *STATE)
PLACES = ("device", "host", "disk")


@dataclass(frozen=True)
class RankBytes:
    """What one rank needs between steps.

    Attributes:
        memory: bytes by kind (``"parameters"``, ``"gradients"``, ``"master"``, ``"optimizer"``) and place
            (``"device"``, ``"host"``, ``"disk"``).
        staging: bytes of host memory for transfers to and from disk, which no ratio makes smaller.
    """

    memory: Mapping[str, Mapping[str, int]]
    staging: int = 0

    def total(self, place: str, kinds: Sequence[str] | None = None) -> int:
        return sum(places.get(place, 0) for kind, places in self.memory.items() if kinds is None or kind in kinds)

    @property
    def by_kind(self) -> dict[str, int]:
        return {kind: sum(places.values()) for kind, places in self.memory.items()}


def bytes_table(by_store: Mapping[str, Mapping[str, int]]) -> str:
    """Bytes of a rank by kind and by where they live between steps, as a table."""
    stores = list(dict.fromkeys(store for of_kind in by_store.values() for store in of_kind))
    total = {store: sum(of_kind.get(store, 0) for of_kind in by_store.values()) for store in stores}
    lines = [f"{'bytes on this rank':<20}" + "".join(f"{store:>18}" for store in stores)]
    for kind, of_kind in [*by_store.items(), ("total", total)]:
        lines.append(f"{kind:<20}" + "".join(f"{of_kind.get(store, 0):>18,}" for store in stores))
    return "\n".join(lines)
