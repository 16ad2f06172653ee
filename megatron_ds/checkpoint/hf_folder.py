"""A folder as ``transformers`` writes it: config.json and safetensors files, read one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_ds.checkpoint.safetensors_header import DTYPES
from megatron_ds.errors import CheckpointError


class HFFolder:
    """The model in a folder.

    Attributes:
        config: config.json. shapes, dtypes: of every tensor, by name.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the weights are pickled.
    """

    # Neighbouring tensors may lie in two files; what is open is only mapped, not held.
    OPEN_FILES = 2

    def __init__(self, path: Path):
        self.path = path
        self._handles: OrderedDict[str, Any] = OrderedDict()
        self.config: dict[str, Any] = self._json("config.json")
        if (path / "model.safetensors.index.json").exists():
            files = sorted(set(self._json("model.safetensors.index.json")["weight_map"].values()))
        elif (path / "model.safetensors").exists():
            files = ["model.safetensors"]
        else:
            pickled = any(path.glob("pytorch_model*.bin"))
            raise CheckpointError(
                f"{path} has no model.safetensors"
                + (" but pickled .bin files, which can run code when loaded" if pickled else "")
                + "; save it with save_pretrained(..., safe_serialization=True)"
            )
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in files:
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118
                self._file_of[name] = file
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())
                self.dtypes[name] = DTYPES[handle.get_slice(name).get_dtype()]

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._open(self._file_of[name]).get_tensor(name)
        return tensor

    def copy_tokenizer(self, target: Path) -> None:
        patterns = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
        files = [file for pattern in patterns for file in self.path.glob(pattern) if file.is_file()]
        if files:
            target.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, target / file.name)

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            if len(self._handles) == self.OPEN_FILES:
                self._handles.popitem(last=False)
            try:
                self._handles[file] = safe_open(self.path / file, "pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.path / file} cannot be read: {error}") from error
        self._handles.move_to_end(file)
        return self._handles[file]

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error}") from error
        return value
