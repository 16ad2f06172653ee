"""Images of any height and width as sequences of patches, and where each patch is.

Shapes: ``s`` patches, row by row; ``b`` batch, ``c`` channels, ``p`` patch size, ``H, W`` height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of patches."""


def grid_of(image: Tensor, patch: int) -> Grid:
    """Of an image ``[..., H, W]``."""
    return image.shape[-2] // patch, image.shape[-1] // patch


def to_patches(image: Tensor, patch: int, last: bool = False) -> Tensor:
    """``[b, c, H, W] -> [s, b, p * p * c]``, features ordered channel, row, column; ``last``: row, column, channel."""
    b, c, height, width = image.shape
    cut = image.view(b, c, height // patch, patch, width // patch, patch)
    order = (2, 4, 0, 3, 5, 1) if last else (2, 4, 0, 1, 3, 5)
    return cut.permute(*order).reshape(-1, b, c * patch * patch)


def from_patches(patches: Tensor, patch: int, grid: Grid) -> Tensor:
    """``[s, b, p * p * c] -> [b, c, H, W]``, from features ordered row, column, channel."""
    rows, columns = grid
    b = patches.shape[1]
    cut = patches.view(rows, columns, b, patch, patch, -1).permute(2, 5, 0, 3, 1, 4)
    return cut.reshape(b, -1, rows * patch, columns * patch)


def sine_positions(size: int, grid: Grid, base: int, largest: int | None = None) -> Tensor:
    """``[s, size]`` fp32: sines and cosines of a patch's column, then of its row.

    Rows and columns count from 0 to ``base``, whatever their number: an image of another size is seen as one of the
    usual size, stretched. With ``largest`` that is so of a square grid of so many rows, of whose middle each image is
    a part (Esser et al. 2024, section 5.3.2).
    """
    frequencies = 1.0 / 10000.0 ** (torch.arange(size // 4, dtype=torch.float64) / (size / 4.0))

    def along(count: int) -> Tensor:
        whole = largest or count
        first = (whole - count) // 2
        places = torch.arange(whole, dtype=torch.float32) / (whole / base)  # fp32, as published weights have it
        angles = torch.outer(places[first : first + count], frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [count, size / 2]

    rows, columns = grid
    return torch.cat([along(columns).repeat(rows, 1), along(rows).repeat_interleave(columns, 0)], dim=1).float()


def rotary_positions(head_size: int, grid: Grid, text: int) -> tuple[Tensor, Tensor]:
    """cos and sin ``[s + text, 1, 1, head_size]`` fp64: half of a head's planes turn by a patch's row, the others by
    its column (2-D rotary, Heo et al. 2024, section 3.1); those of text do not turn."""
    rows, columns = grid
    frequencies = 1.0 / 10000.0 ** (torch.arange(head_size // 4, dtype=torch.float64) / (head_size // 4))
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)
    planes = torch.cat([torch.outer(row, frequencies), torch.outer(column, frequencies)], dim=1)
    angles = torch.cat([planes, planes.new_zeros(text, head_size // 2)])
    whole = torch.cat([angles, angles], dim=1)[:, None, None]
    return whole.cos(), whole.sin()
