"""tools/sample_images.py whose images are kept as they are drawn, in a module that ranks can import."""

from __future__ import annotations

from typing import Any

import torch
from scripts_as_modules import load_script

from megatron_ds.train.launch import RankInfo


def sample_images() -> Any:
    """The tool as a module; ``--output`` becomes a file of :func:`torch.save` with the images and the columns."""
    tool = load_script("tools/sample_images.py")
    tool.save_grid = lambda images, columns, output: torch.save((images, columns), output)
    return tool


def main(place: RankInfo) -> int:
    return int(sample_images().main(place))
