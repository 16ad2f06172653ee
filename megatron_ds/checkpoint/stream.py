"""Write tensors one at a time into files of a few GB, so that no model is ever whole in memory: for conversion."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint.index import IndexBuilder
from megatron_ds.checkpoint.manifest import rank_name, step_name
from megatron_ds.checkpoint.manifest_file import write_manifest
from megatron_ds.checkpoint.safetensors_header import Entry, Layout, dtype_name, layout
from megatron_ds.checkpoint.save import prepare, publish
from megatron_ds.checkpoint.writer import ChunkedWriter, FileRecord
from megatron_ds.files import sync_directory

FILE_BYTES = 4_000_000_000

Plan = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name to (shape, dtype) of every tensor that will be written: known before any is, from configuration or headers."""


def plan_bytes(plan: Plan) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in plan.values())


class TensorFiles:
    """Safetensors files of at most ``file_bytes`` each (a larger tensor gets a file of its own), written in order.

    Args:
        plan: what will be written.
        file_name: (index, number of files) to a name.
        key: a tensor's name to its key in the file.

    Attributes:
        order: the names in the order in which :meth:`write` must get them: the plan's, wider dtypes first.
        names: of the files. place: a tensor's name to (index of its file, first byte in it).
    """

    def __init__(
        self,
        directory: Path,
        plan: Plan,
        file_name: Callable[[int, int], str],
        key: Callable[[str], str] = lambda name: name,
        file_bytes: int = FILE_BYTES,
    ):
        self.order = sorted(plan, key=lambda name: -plan[name][1].itemsize)
        groups: list[list[str]] = [[]]
        filled = 0
        for name in self.order:
            size = prod(plan[name][0]) * plan[name][1].itemsize
            if groups[-1] and filled + size > file_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += size
        self.names = [file_name(index, len(groups)) for index in range(len(groups))]
        self._paths = [directory / name for name in self.names]
        self._layouts: list[Layout] = []
        self.place: dict[str, tuple[int, int]] = {}
        for index, names in enumerate(groups):
            entries = [Entry(key(name), dtype_name(plan[name][1]), plan[name][0]) for name in names]
            self._layouts.append(layout(entries, {"format": "pt"}))
            self.place.update({name: (index, start) for name, start in zip(names, self._layouts[-1].starts)})
        self._plan = plan
        self._next = 0
        self._writer: ChunkedWriter | None = None
        self._records: list[FileRecord] = []

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor of :attr:`order`; it must not change until :meth:`finish`, but may be dropped."""
        expected = self.order[self._next] if self._next < len(self.order) else None
        if name != expected:
            raise ValueError(f"{name!r} was written where {expected!r} comes next in the order")
        if (tuple(tensor.shape), tensor.dtype) != self._plan[name]:
            shape, dtype = self._plan[name]
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)}, planned were {dtype} and {list(shape)}"
            )
        self._open(self.place[name][0]).write(tensor.contiguous())
        self._next += 1

    def finish(self) -> list[FileRecord]:
        """All files durable on the disk; their sizes and checksums."""
        if self._next != len(self.order):
            raise ValueError(
                f"{len(self.order) - self._next} tensors were not written; next is {self.order[self._next]!r}"
            )
        self._open(len(self._paths) - 1)  # a plan without tensors still has its one file
        self._close()
        return self._records

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()

    def _open(self, index: int) -> ChunkedWriter:
        if self._writer is None or len(self._records) < index:
            self._close()
            self._writer = ChunkedWriter(self._paths[index], self._layouts[index])
        return self._writer

    def _close(self) -> None:
        if self._writer is not None:
            self._records.append(self._writer.close())
            self._writer = None


class StreamWriter:
    """A checkpoint written by one process, one whole tensor at a time, committed like any other.

    ::

        with StreamWriter(directory, 0, meta, plan) as writer:
            for name in writer.order:
                writer.write(name, make(name))

    Leaving the block commits; leaving it by an exception removes what was written.
    """

    def __init__(
        self,
        directory: str | Path,
        step: int,
        meta: dict[str, Any],
        plan: Plan,
        kind: str = "param",
        file_bytes: int = FILE_BYTES,
    ):
        self.directory, self.step, self.meta, self.kind = Path(directory), step, meta, kind
        self._plan = plan
        self._partial = prepare(self.directory, step, plan_bytes(plan))
        self._files = TensorFiles(
            self._partial,
            plan,
            lambda index, count: rank_name(index),
            lambda name: f"{kind}/{name}",
            file_bytes,
        )
        self.order: Sequence[str] = self._files.order
        self.write = self._files.write

    def commit(self) -> Path:
        contents = IndexBuilder()
        files = self._files.finish()
        for file in files:
            contents.add_file(file)
        for name, (shape, dtype) in self._plan.items():
            rows = [[*self._files.place[name], *(0,) * len(shape), *shape]] if prod(shape) else []
            contents.add_parts([(self.kind, name, shape, dtype_name(dtype), len(rows))], rows)
        write_manifest(self._partial, self.step, len(files), self.meta, contents)
        sync_directory(self._partial)
        final = self.directory / step_name(self.step)
        publish(self.directory, final, self._partial)
        return final

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self._files.abort()
            shutil.rmtree(self._partial, ignore_errors=True)
