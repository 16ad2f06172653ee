"""A model's folder as ``transformers`` or ``diffusers`` writes it: which files hold the weights, read tensor by tensor.

The weights are chosen as those libraries choose them: ``model.safetensors``, else the shards that
``model.safetensors.index.json`` lists, else ``pytorch_model.bin``, else the shards of its index. Files of ``diffusers``
are called ``diffusion_pytorch_model``, and there an index comes first. Nothing outside the folder is read, whatever a
name in an index or a link says.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_ds.checkpoint.safetensors_header import DTYPES
from megatron_ds.checkpoint.stream import Plan, TensorFiles, plan_bytes
from megatron_ds.errors import CheckpointError, RaisedAs, not_there
from megatron_ds.files import check_regular, read_object, write_json

TRANSFORMERS, DIFFUSERS = "model", "diffusion_pytorch_model"
"""What the names of files of weights begin with."""
_PICKLED = {TRANSFORMERS: "pytorch_model.bin", DIFFUSERS: "diffusion_pytorch_model.bin"}
ADAPTER = "adapter_config.json"


def file_name(stem: str, index: int, count: int) -> str:
    """The name of one of ``count`` files of weights."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, stem: str, files: TensorFiles, plan: Plan) -> None:
    """The index of the files that were written, where there are several."""
    if len(files.names) > 1:
        index = {
            "metadata": {"total_size": plan_bytes(plan)},
            "weight_map": {name: files.names[file] for name, (file, _) in sorted(files.place.items())},
        }
        write_json(folder / f"{stem}.safetensors.index.json", index)


class _Weights(Protocol):
    """One open file: shape and dtype of every tensor, and the tensors."""

    found: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def read(self, name: str) -> torch.Tensor: ...


class WeightFolder:
    """The weights in a folder.

    Args:
        stem: what the names of its files begin with, :data:`TRANSFORMERS` or :data:`DIFFUSERS`. None: either, and where
            there are none of these, all safetensors files are read.

    Attributes:
        shapes, dtypes: of every tensor, by name. notes: what should be said of the choice.

    Raises:
        CheckpointError: a file is missing, cannot be read or lies outside the folder; the files disagree about which
            tensor lies where.
    """

    # Neighbouring tensors may lie in two files; what is open is only mapped, not held.
    OPEN_FILES = 2

    def __init__(self, path: Path, stem: str | None = TRANSFORMERS):
        self.path = path
        self.notes: list[str] = []
        self._open_files: OrderedDict[str, _Weights] = OrderedDict()
        files, listed = self._weight_files(stem or self._stem())
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in files:
            for name, (shape, dtype) in self._open(file).found.items():
                if name in self._file_of:
                    raise CheckpointError(
                        f"{path}: {name} is in {self._file_of[name]} and in {file}, and only one of them can be meant; "
                        "remove the one of another save"
                    )
                self._file_of[name], self.shapes[name], self.dtypes[name] = file, shape, dtype
        for name, file in listed.items():
            if self._file_of.get(name) != file:
                raise CheckpointError(
                    f"{path}: the index says that {name} is in {file}, but it is in "
                    f"{self._file_of.get(name, 'no file')}: index and shards are of different saves"
                )

    def check_dtype(self, name: str) -> None:
        """A :class:`CheckpointError` where a weight is kept in a format of quantisation."""
        if not self.dtypes[name].is_floating_point or self.dtypes[name].itemsize < 2:
            raise CheckpointError(f"{self.path}: {name} is {self.dtypes[name]}, quantised: {_DEQUANTISE}")

    def read(self, name: str) -> torch.Tensor:
        return self._open(self._file_of[name]).read(name)

    def inside(self, name: str) -> Path:
        """The regular file ``name`` of this folder.

        Raises:
            CheckpointError: it cannot be read, or lies elsewhere: by ``..``, by an absolute path or by a link. The
                links of the hub's cache, from a snapshot to the blobs of the same repository, are followed.
        """
        path, home = self.path / name, Path(os.path.realpath(self.path))
        roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        outside = Path(name).is_absolute() or ".." in Path(name).parts
        with RaisedAs(CheckpointError, f"{path} cannot be read", OSError, ValueError):
            if outside or not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
                raise CheckpointError(
                    f"{self.path}: {name} leads out of the folder, and nothing outside it is read; copy the file there"
                )
            check_regular(path)
        return path

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the folder."""
        return read_object(self.inside(name), CheckpointError)

    def _stem(self) -> str | None:
        names = [path.name for path in self.path.glob("*.safetensors")]
        return next((s for s in _PICKLED for n in names if re.fullmatch(rf"{s}(-\d+-of-\d+)?\.safetensors", n)), None)

    def _weight_files(self, stem: str | None) -> tuple[list[str], dict[str, str]]:
        """The files to read, and what an index says of them: a tensor's name to its file."""
        if stem is None:
            if files := sorted(path.name for path in self.path.glob("*.safetensors")):
                return files, {}
            raise CheckpointError(f"{self.path} holds no safetensors files; give a folder that save_pretrained wrote")
        single, pickled = f"{stem}.safetensors", _PICKLED[stem]
        index, pickled_index = f"{single}.index.json", f"{pickled}.index.json"
        # Of two saves in one folder transformers takes the single file, and diffusers the shards of the index.
        preferred, other = (single, index) if stem == TRANSFORMERS else (index, single)
        there = [n for n in (preferred, other, pickled, pickled_index) if (self.path / n).is_file()]
        if there[:2] == [preferred, other]:
            library = "transformers" if stem == TRANSFORMERS else "diffusers"
            self.notes.append(f"{preferred} is read, as {library} does; {other} beside it is not")
        if there:
            if there[0] in (pickled, pickled_index):
                self.notes.append(
                    "the weights are pickled; torch reads them with weights_only, which runs no code of them"
                )
            return self._listed(there[0]) if there[0].endswith(".index.json") else ([there[0]], {})
        shards = sorted(path.name for path in self.path.glob(f"{stem}-*-of-*.safetensors"))
        if shards:
            raise CheckpointError(f"{self.path} has {shards[0]} but no {index}, which says what is where")
        for name in (single, pickled):
            if (self.path / name).exists() or (self.path / name).is_symlink():
                self.inside(name)  # says what is wrong with it
        raise CheckpointError(f"{self.path} has no {single} and no {pickled}; save the model with save_pretrained")

    def _listed(self, index: str) -> tuple[list[str], dict[str, str]]:
        places = self.json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise CheckpointError(f"{self.path / index} has no weight_map of names and files")
        return sorted(set(places.values())), places

    def _open(self, file: str) -> _Weights:
        if file not in self._open_files:
            if len(self._open_files) == self.OPEN_FILES:
                self._open_files.popitem(last=False)
            path = self.inside(file)
            self._open_files[file] = Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)
        self._open_files.move_to_end(file)
        return self._open_files[file]


class HFFolder(WeightFolder):
    """The model in a folder of ``transformers``.

    Attributes:
        config: config.json.

    Raises:
        CheckpointError: as of its weights; or they are quantised, or there is an adapter to them.
    """

    def __init__(self, path: Path):
        self.path = path
        if not os.path.lexists(path):
            raise CheckpointError(not_there(path))
        if (path / ADAPTER).is_file():
            raise CheckpointError(
                f"{path} holds an adapter ({ADAPTER}), which transformers applies and which is not read here: merge it "
                "(peft's merge_and_unload, then save_pretrained), or take its files out to have the model without it"
            )
        self.config: dict[str, Any] = self.json("config.json")
        self.require_plain()
        super().__init__(path)

    def require_plain(self) -> None:
        """A :class:`CheckpointError` where config.json says that the weights are quantised."""
        quantised = self.config.get("quantization_config") or self.config.get("compression_config")
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise CheckpointError(f"{self.path} is quantised (quant_method={method!r}): {_DEQUANTISE}")


_DEQUANTISE = (
    "dequantise first: load it with transformers (dtype=torch.bfloat16) and save_pretrained what it dequantised"
)


class Safetensors:
    """A safetensors file, mapped."""

    def __init__(self, path: Path):
        self.found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        with RaisedAs(CheckpointError, f"{path} cannot be read", OSError, SafetensorError):
            check_regular(path)
            self._handle = safe_open(path, "pt")
            for name in self._handle.keys():  # noqa: SIM118
                part = self._handle.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise CheckpointError(f"{path}: {name} is {part.get_dtype()}, quantised: {_DEQUANTISE}")
                self.found[name] = (tuple(part.get_shape()), DTYPES[part.get_dtype()])

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle.get_tensor(name)
        return tensor


class _Pickled:
    """A file of ``torch.save``, mapped where its format allows it, read by torch's weights-only reader."""

    def __init__(self, path: Path):
        try:
            try:
                state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # of before torch 1.6: not a zip file
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the reader raises many kinds, some of modules that are not imported here
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} cannot be read by torch's weights-only reader: {reason}") from error
        if not isinstance(state, dict) or not state or not all(_plain(*item) for item in state.items()):
            raise CheckpointError(f"{path} does not hold a model's state: names and dense tensors")
        self._state: dict[str, torch.Tensor] = state
        self.found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._state[name].detach()


def _plain(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
    )
