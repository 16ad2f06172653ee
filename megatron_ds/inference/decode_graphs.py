"""Decode steps as CUDA graphs: the batch is padded to one of a few sizes (buckets), each captured once.

A padding row is a text of one token in a block that is nobody's, so no live block is written and no row of another text
changes; its logits are dropped. Prompts and guesses run eagerly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_ds.inference.paged_cache import PagedStep, StepPlaces
from megatron_ds.kernels.paged_attention import PagedTexts
from megatron_ds.mesh import Mesh

Capture = Callable[[Callable[[], None]], Callable[[], object]]
"""Records what a function does on the device and returns what does it again."""
Forward = Callable[[Tensor, Tensor, PagedStep], Tensor]
"""Tokens and positions ``[1, t]`` to logits ``[t, v]``."""


def capture_for(mesh: Mesh) -> Capture | None:
    """How graphs are captured on this device; None: not at all. One rank alone: no collective is captured."""
    return cuda_capture() if mesh.device.type == "cuda" and mesh.world.size == 1 else None


def cuda_capture() -> Capture:
    """Captures into graphs that share their memory. The largest comes first: the others fit into what it leaves."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], None]) -> Callable[[], object]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()  # compiles kernels and makes workspaces, which a capture must not
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay

    return capture


@dataclass(frozen=True)
class GraphSizes:
    """What the buffers of the graphs are made for.

    Attributes:
        rows: texts of a step at most. blocks: of a text at most, of ``size`` tokens each.
        vocab: logits of a row, in ``dtype``.
    """

    rows: int
    blocks: int
    size: int
    vocab: int
    dtype: torch.dtype

    @property
    def buckets(self) -> list[int]:
        """Powers of two, and the most."""
        return [1 << i for i in range((self.rows - 1).bit_length())] + [self.rows]

    @property
    def bytes(self) -> int:
        """Of the static buffers."""
        return self.rows * (3 * 8 + 4 * self.blocks + 3 * 4 + self.vocab * self.dtype.itemsize)


class DecodeGraphs:
    """The captured steps of a model, and the static buffers that they read and write.

    Args:
        scratch: number of the block that padding rows write.
    """

    def __init__(self, forward: Forward, capture: Capture, sizes: GraphSizes, scratch: int, device: torch.device):
        self.sizes, self._scratch, self._forward = sizes, scratch, forward
        rows = sizes.rows
        self.numbers = torch.zeros(3, rows, dtype=torch.int64, device=device)  # tokens, places, slots
        self.tables = torch.zeros(rows, sizes.blocks, dtype=torch.int32, device=device)
        self.spans = torch.tensor([(row, 1, 0) for row in range(rows)], dtype=torch.int32, device=device)
        self.logits = torch.empty(rows, sizes.vocab, dtype=sizes.dtype, device=device)
        self._fill(rows)
        self._replays = {count: capture(partial(self._run, count)) for count in reversed(sizes.buckets)}

    def takes(self, places: StepPlaces) -> bool:
        """Whether the step is one of decoding."""
        return len(places.spans) <= self.sizes.rows and places.decodes

    def run(self, tokens: Sequence[int], places: StepPlaces) -> Tensor:
        """Logits ``[t, v]``, until the next call."""
        buckets = self.sizes.buckets
        count = buckets[bisect_left(buckets, len(tokens))]
        self._fill(count, tokens, places)
        self._replays[count]()
        return self.logits[: len(tokens)]

    def _fill(self, count: int, tokens: Sequence[int] = (), places: StepPlaces | None = None) -> None:
        numbers = np.zeros((3, count), np.int64)
        numbers[2] = self._scratch * self.sizes.size
        tables = np.full((count, 1 if places is None else places.tables.shape[1]), self._scratch, np.int32)
        if places is not None:
            numbers[:, : len(tokens)] = tokens, places.positions, places.written
            tables[: len(tokens)] = places.tables
        self.numbers[:, :count] = torch.from_numpy(numbers)
        self.tables[:count, : tables.shape[1]] = torch.from_numpy(tables)

    @torch.inference_mode()
    def _run(self, count: int) -> None:
        tokens, places, slots = self.numbers[:, :count]
        self.spans[:count, 2] = places
        texts = PagedTexts(self.tables[:count], self.spans[:count], self.sizes.size, longest=1, decodes=True)
        logits = self._forward(tokens.unsqueeze(0), places.unsqueeze(0), PagedStep(texts, slots))
        self.logits[:count] = logits
