"""Batch ramp-up: a global batch that grows at the beginning of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchRamp:
    """From ``start`` to ``final`` by ``increment``, each size for an equal part of the first ``samples`` samples.

    A function of the samples consumed and of nothing else, so a run resumes inside it wherever it was stopped. The
    size changes between two steps: at the first that begins at or after the end of a part.
    """

    start: int
    increment: int
    samples: int
    final: int

    def __call__(self, consumed: int) -> int:
        """Samples of the step that begins after ``consumed`` samples."""
        parts = (self.final - self.start) // self.increment
        return min(self.final, self.start + self.increment * (consumed * parts // self.samples))

    def sizes(self) -> list[int]:
        """All global batches that may occur, in order."""
        return list(range(self.start, self.final + 1, self.increment))
