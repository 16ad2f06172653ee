"""tools/sample_images.py whose images are kept as they are drawn, in a module that ranks can import."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_ds.train.launch import RankInfo


def sample_images() -> Any:
    """The tool as a module; ``--output`` becomes a file of :func:`torch.save` with the images and the columns."""
    path = Path(__file__).parents[2] / "tools" / "sample_images.py"
    spec = importlib.util.spec_from_file_location("sample_images_tool", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # dataclasses and tyro look their annotations up there
    spec.loader.exec_module(tool)
    tool.save_grid = lambda images, columns, output: torch.save((images, columns), output)
    return tool


def main(place: RankInfo) -> int:
    return int(sample_images().main(place))
