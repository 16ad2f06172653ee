"""The output directory of a run: what is in it, and who may write there.

::

    output/
      config.toml        the resolved configuration: `--config output/config.toml` runs it again
      metrics.jsonl      one line a step
      evaluation.jsonl   one line an evaluation
      checkpoints/       step-00000100/ ..., latest
      tensorboard/
      timeline/          recorded pipeline timelines
      lock               while a job writes here
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.directory import steps_in
from megatron_ds.checkpoint.manifest import step_name
from megatron_ds.config import BaseRunConfig, from_dict, read_toml, to_toml
from megatron_ds.data.cache import locked
from megatron_ds.data.samples import LATENTS
from megatron_ds.errors import ConfigError, RaisedAs, listed
from megatron_ds.files import read_bytes, replacing
from megatron_ds.train.alike import changes
from megatron_ds.train.report import MOST_BYTES

# A run that goes on with another one of these would be another run.
_OF_ONE_START = ("output", "checkpoint.resume", "checkpoint.resume_from", "data.changed")
LAST_GOOD = "last-good"


class Output:
    """Paths of a run's output."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / "config.toml"
        self.metrics = self.root / "metrics.jsonl"
        self.evaluation = self.root / "evaluation.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.tensorboard = self.root / "tensorboard"
        self.timeline = self.root / "timeline"

    def resume_path(self, config: BaseRunConfig) -> Path | None:
        """What a run continues from: a run's directory (its latest is meant), or one step's; None: it starts anew.

        For ``last-good`` it is the directory, in which the step is still to be found.
        """
        wanted = config.checkpoint.resume_from
        if wanted is None:
            return self.checkpoints if config.checkpoint.resume and self.has_checkpoint else None
        if wanted == LAST_GOOD:
            return self.checkpoints
        text = str(wanted)
        return self.checkpoints / step_name(int(text)) if text.isascii() and text.isdigit() else Path(text)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from, were it damaged: then loading it says so."""
        return (self.checkpoints / "latest").exists() or bool(steps_in(self.checkpoints))

    def check(self, config: BaseRunConfig) -> list[str]:
        """Refuse to mix two runs. Reads only.

        Returns:
            What a resumed run does differently from now on, as ``key: before -> now``.

        Raises:
            ConfigError: the directory holds a run that this one does not continue, or that run's model or seed is
                another one; or the directory cannot be written.
        """
        existing = self.root
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(f"output={str(self.root)!r} cannot be made: {existing} is not a writable directory")
        source = self.resume_path(config)
        own = source is not None and source.absolute().is_relative_to(self.checkpoints.absolute())
        if source is not None and not own and not source.exists():
            raise ConfigError(
                f"checkpoint.resume_from={config.checkpoint.resume_from!r} does not exist; give {LAST_GOOD}, a step of "
                f"{self.checkpoints}, or a path"
            )
        if not (own or (source is None and config.checkpoint.resume)):
            holds = "checkpoints" if self.has_checkpoint else "metrics.jsonl" if _size(self.metrics) else ""
            # A config.toml alone is of a run that ended in its first step: nothing is lost with it.
            if holds:
                raise ConfigError(
                    f"output={str(self.root)!r} holds another run (its {holds}); choose another directory, or "
                    "continue that run with --checkpoint.resume"
                )
            return []
        if not self.config.exists():
            return []
        try:
            before = from_dict(type(config), read_toml(self.config), str(self.config))
        except (ConfigError, OSError, ValueError) as error:
            raise ConfigError(
                f"checkpoint.resume: the settings of before cannot be compared: {error}; remove {self.config} to "
                "resume without that"
            ) from None
        return check_settings(before.to_dict(), config, str(self.root), f"its settings (--config {self.config})")

    @contextlib.contextmanager
    def owned(self, config: BaseRunConfig) -> Iterator[None]:
        """Make the directory and keep every other job out of it; on rank 0, after every rank has checked.

        Raises:
            ConfigError: another job writes there now, or came first.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.root / "lock", wait=False))
            except BlockingIOError:
                raise ConfigError(
                    f"another job is writing to output={str(self.root)!r} at this moment; wait for it, or choose "
                    f"another directory{_each_a_job()}"
                ) from None
            except OSError as error:
                raise ConfigError(f"output={str(self.root)!r} cannot be written: {error}") from None
            self.check(config)  # once more: a job that started together with this one may have been quicker
            yield

    def prepare(self, config: BaseRunConfig, steps: int) -> list[str]:
        """Write the resolved configuration, and forget what was recorded beyond ``steps``.

        Returns:
            What is to be said of :meth:`truncate_metrics`.

        Raises:
            ConfigError: the disk is full, or the like.
        """
        with RaisedAs(ConfigError, f"output={str(self.root)!r} cannot be written", OSError):
            notes = self.truncate_metrics(steps)
            with replacing(self.config) as temporary:
                temporary.write_bytes(to_toml(_for_good(config)).encode())
            return notes

    def truncate_metrics(self, steps: int) -> list[str]:
        """Drop the lines of steps beyond ``steps``, which a resumed run does again, and damaged ones.

        Returns:
            Which lines were damaged, to be said.
        """
        notes, found = [], {}
        for path in (self.metrics, self.evaluation):  # both are read before either is written
            with contextlib.suppress(FileNotFoundError):
                found[path] = read_bytes(path, MOST_BYTES).splitlines(keepends=True)
        for path, lines in found.items():
            told = [_step_of(line) for line in lines]
            kept = [line for line, step in zip(lines, told) if step is not None and step <= steps]
            if len(kept) < len(lines):
                with replacing(path) as temporary:
                    temporary.write_bytes(b"".join(kept))
            damaged = [number for number, step in enumerate(told, start=1) if step is None]
            if damaged:
                shown = listed(damaged, 8)
                notes.append(f"{path}: {len(damaged)} damaged or cut-off lines were dropped (line {shown})")
        return notes


def _each_a_job() -> str:
    """What to say where srun or mpirun started several processes, each of which takes itself for a whole job."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if "RANK" not in os.environ and os.environ.get(name, "1") != "1":
            return (
                f". {name}={os.environ[name]}: that many processes were started, and each trains alone; start one a "
                "node that runs torchrun, as in examples/slurm_pretrain_llama3_8b.sbatch"
            )
    return ""


def check_settings(
    before: dict[str, Any], config: BaseRunConfig, where: str, way_out: str = "its settings"
) -> list[str]:
    """What a run does differently from the one that it continues, as ``key: before -> now``.

    Raises:
        ConfigError: the model or the seed is another one.
    """
    free = set(_OF_ONE_START)
    if config.precision.fp8 == "none":  # nothing is quantised; but the files of older runs have what was its default
        free.add("precision.fp8_from_masters")
    changed = changes(from_dict(type(config), before, where).to_dict(), config.to_dict())
    found = {key: f"{key}: {old!r} -> {new!r}" for key, old, new in changed if key not in free}
    refused = [text for key, text in found.items() if config.fixed & {key, key.split(".")[0]}]
    if refused:
        raise ConfigError(
            f"checkpoint.resume: the run in {where!r} is of another model or seed ({'; '.join(refused)}); use "
            f"{way_out}, or another output directory"
        )
    return list(found.values())


def check_data(before: dict[str, Any] | None, now: dict[str, Any] | None, changed: str) -> list[str]:
    """How the data differs from the data that a run was trained on before, where ``data.changed`` accepts that.

    Raises:
        ConfigError: it differs, and that is not accepted, or is of another VAE or scale of latents.
    """
    if before is None or now is None or content_of(before) == content_of(now):
        return []
    if before.get(LATENTS) != now.get(LATENTS):
        raise ConfigError(
            f"checkpoint.resume: this run was trained on {latents_of(before)}, and the data has {latents_of(now)}: the "
            "model would see and draw something else than it has learnt. Use the data of before, or start a run of its "
            "own with checkpoint.init_from"
        )
    text = "; ".join(_data_changes(before, now))
    if changed == "accept":
        return [f"data changed, as accepted: {text}"]
    raise ConfigError(
        f"checkpoint.resume: the data is not what this run was trained on ({text}): samples would come in another "
        "order, and some that were kept for validation would be trained on. Use the data of before, or continue on "
        "purpose with --data.changed accept"
    )


def latents_of(identity: Mapping[str, Any]) -> str:
    """What images are of some data, and texts, for messages."""
    found = identity.get(LATENTS)
    if found is None:
        return "pixels"
    texts = f", with texts of {found['texts']}" if "texts" in found else ""
    return f"latents of scale {found['scale']}, shift {found['shift']}, {found['vae']}{texts}"


def _data_changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    old, new = before.get("datasets", []), now.get("datasets", [])
    if len(old) != len(new):
        yield f"{len(old)} datasets -> {len(new)}"
    for one, other in zip(old, new):
        if content_of(one) != content_of(other):
            sizes = [f"{d['documents']:,} documents of {d['tokens']:,} tokens" for d in (one, other)]
            yield f"{other['prefix']}: {sizes[0]} -> {sizes[1] if sizes[0] != sizes[1] else 'as many, but others'}"
    for key in sorted((before.keys() | now.keys()) - {"datasets"}):
        if before.get(key) != now.get(key):
            yield f"{key}: {before.get(key)} -> {now.get(key)}"


def content_of(identity: Any) -> Any:
    """An identity of data without the places where it lies."""
    if isinstance(identity, dict):
        return {key: content_of(value) for key, value in identity.items() if key != "prefix"}
    return [content_of(item) for item in identity] if isinstance(identity, list | tuple) else identity


def _for_good(config: BaseRunConfig) -> BaseRunConfig:
    """The settings without those that are meant once, for this start: the next one must not go back again."""
    checkpoint = config.checkpoint.model_copy(update={"resume_from": None})
    data = config.data.model_copy(update={"changed": "refuse"})
    return config.model_copy(update={"checkpoint": checkpoint, "data": data})


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _step_of(line: bytes) -> int | None:
    """The step a line of metrics tells of; None for one that was damaged, or cut off by a crash."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
