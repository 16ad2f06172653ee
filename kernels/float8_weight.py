"""The weight of a linear layer in FP8, quantised by ranks of which each has a flat range of its elements (FP8 primary
weights, as TransformerEngine calls them).

A rank finds the amax of what it has of each block (:func:`add_amax`), the ranks take the largest, and then each casts
its own elements (:func:`cast`): every element gets the bits that :func:`megatron_ds.kernels.float8.quantize_both` of
the whole matrix gives it. What is gathered is one byte an element; two where the transpose has other blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.kernels.float8 import E4M3, FLOAT8, Block, Float8, takes_twin

_CHUNK = 1 << 22  # elements at a time: of those several copies in the weight's own precision exist for a moment


@dataclass(frozen=True)
class Float8Format:
    """How a weight ``[rows, k]`` is quantised. ``power_of_two``: see :func:`megatron_ds.kernels.float8.scale_of`."""

    block: Block
    power_of_two: bool

    @property
    def codes(self) -> int:
        """Bytes an element: square blocks are those of the transpose too, other blocks are not."""
        return 1 if self.block.is_square else 2

    def scale_shapes(self, rows: int, k: int) -> list[tuple[int, int]]:
        """Of the scales of the weight and, if those are others, of its transpose ``[k, rows]``."""
        return [self.block.grid(*shape)[:2] for shape in ((rows, k), (k, rows))[: self.codes]]


class Float8Weight:
    """An FP8 primary weight: codes and scales that a layer multiplies by, in place of a weight in high precision.

    It belongs to the parameter (``parameter.float8``) and to the layer's recipe. ZeRO gathers the codes.
    """

    def __init__(self, form: Float8Format):
        self.form = form
        self._codes: tuple[Tensor, ...] = ()
        self._scales: tuple[Tensor, ...] = ()
        self._turned = False
        self._keeps = False
        self._transposed: Float8 | None = None

    @property
    def is_given(self) -> bool:
        """Whether buffers are set. Else the layer uses its weight in high precision."""
        return len(self._codes) > 0

    def give(self, codes: Sequence[Tensor], scales: Sequence[Tensor], turned: bool = False) -> None:
        """Set the buffers that codes and scales are gathered into.

        Args:
            codes: each ``[rows, k]`` in e4m3; a second set, for the transpose, where the format has two.
            scales: for each, of the shapes that :meth:`Float8Format.scale_shapes` says.
            turned: the second set is transposed in place, by :meth:`turn`, after each gather.
        """
        self._codes, self._scales, self._transposed = tuple(codes), tuple(scales), None
        self._turned = turned and len(codes) > 1

    def turn(self) -> None:
        """Transpose the second set of codes in place, so that products need no copy of it."""
        if self._turned:
            codes = self._codes[1]
            codes.view(codes.mT.shape).copy_(codes.mT.contiguous())

    def keep_transposed(self, on: bool) -> None:
        """While it is on the codes do not change, and their transpose is made once."""
        self._keeps, self._transposed = on, None

    def of(self, transposed: bool) -> Float8:
        """The weight ``[rows, k]`` or its transpose ``[k, rows]``, row-major."""
        if not transposed:
            return Float8(self._codes[0], self._scales[0], self.form.block)
        if self._turned:
            codes = self._codes[1]
            return Float8(codes.view(codes.mT.shape), self._scales[1], self.form.block)
        keeps = not torch.compiler.is_compiling() and self._keeps
        if keeps and self._transposed is not None:
            return self._transposed
        scale = self._scales[-1].mT.contiguous() if self.form.block.is_square else self._scales[-1]
        found = Float8(self._codes[-1].mT.contiguous(), scale, self.form.block)
        if keeps:
            self._transposed = found
        return found


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Output and input features of a weight ``[*out, in]``."""
    *out, features = shape
    return math.prod(out), features


def add_amax(form: Float8Format, flat: Tensor, start: int, k: int, amax: Sequence[Tensor]) -> None:
    """Raise the amax of blocks to that of the elements ``flat [n]`` of a matrix, from its element ``start`` on.

    Args:
        k: columns of the matrix.
        amax: fp32, of the shapes that :meth:`Float8Format.scale_shapes` says, zero at first. NaN stays NaN.
    """
    side = form.block.k
    if takes_twin(flat, form.block):
        FLOAT8.load(flat).range_amax(flat, start, k, form.block.rows is None, side, amax)
        return
    for part, rows, columns in _parts(flat, start, k):
        magnitude = part.abs()
        if side is not None:
            top, left = rows.start % side, columns.start % side
            magnitude = F.pad(magnitude, (left, -columns.stop % side, top, -rows.stop % side))
            down, across = (size // side for size in magnitude.shape)
            found = magnitude.view(down, side, across, side).amax((1, 3)).float()
            first_row, first_column = rows.start // side, columns.start // side
            seen = amax[0][first_row : first_row + down, first_column : first_column + across]
            torch.maximum(seen, found, out=seen)
        elif form.block.is_square:
            torch.maximum(amax[0], magnitude.amax().float(), out=amax[0])
        else:
            for seen, found in ((amax[0][rows], magnitude.amax(1)), (amax[1][columns], magnitude.amax(0))):
                torch.maximum(seen, found.float().unsqueeze(1), out=seen)


def cast(
    form: Float8Format, flat: Tensor, start: int, k: int, scales: Sequence[Tensor], codes: Sequence[Tensor]
) -> None:
    """The same elements in e4m3, each by the scale of its block, into ``codes``, each ``[n]``."""
    if takes_twin(flat, form.block):
        FLOAT8.load(flat).range_cast(flat, start, k, form.block.rows is None, form.block.k, scales, codes)
        return
    limit, begin = torch.finfo(E4M3).max, 0
    for part, rows, columns in _parts(flat, start, k):
        wide = part if part.dtype == torch.float64 else part.float()
        for number, (of_blocks, into) in enumerate(zip(scales, codes)):
            scaled = wide / _of_elements(form.block, of_blocks.to(wide.dtype), rows, columns, transposed=number == 1)
            into[begin : begin + part.numel()].view(part.shape).copy_(scaled.clamp_(-limit, limit))
        begin += part.numel()


def _of_elements(block: Block, scale: Tensor, rows: slice, columns: slice, transposed: bool) -> Tensor:
    """A scale for each element of a part of a matrix, or what broadcasts to it."""
    side = block.k
    if side is not None:
        down, across = (torch.arange(s.start, s.stop, device=scale.device) // side for s in (rows, columns))
        return scale.index_select(0, down).index_select(1, across)
    if block.is_square:
        return scale
    return scale[columns].mT if transposed else scale[rows]


def _parts(flat: Tensor, start: int, k: int) -> Iterator[tuple[Tensor, slice, slice]]:
    """A flat range of a matrix as rectangles with their rows and columns: the rest of a row, whole rows, and a last
    row's beginning."""
    begin, most = 0, max(_CHUNK // k, 1)
    while begin < flat.numel():
        row, column = divmod(start + begin, k)
        left = flat.numel() - begin
        rows = 1 if column or left < k else min(left // k, most)
        width = min(k - column, left) if rows == 1 else k
        part = flat[begin : begin + rows * width].view(rows, width)
        yield part, slice(row, row + rows), slice(column, column + width)
        begin += rows * width
