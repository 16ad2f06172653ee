"""The output directory of a run: what is in it, and who may write there.

::

    output/
      config.toml        the resolved configuration: `--config output/config.toml` runs it again
      metrics.jsonl      one line a step
      checkpoints/       step-00000100/ ..., latest
      tensorboard/
      timeline/          recorded pipeline timelines
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from megatron_ds.config import RunConfig, load_toml, to_toml
from megatron_ds.errors import ConfigError


class Output:
    """Paths of a run's output."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / "config.toml"
        self.metrics = self.root / "metrics.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.tensorboard = self.root / "tensorboard"
        self.timeline = self.root / "timeline"

    @property
    def has_checkpoint(self) -> bool:
        return (self.checkpoints / "latest").exists()

    def check(self, config: RunConfig) -> None:
        """Refuse to mix two runs. Reads only; every rank comes to the same verdict.

        Raises:
            ConfigError: the directory holds a run and ``checkpoint.resume`` is off, or that run's model or seed is
                another one; or the directory cannot be written.
        """
        existing = self.root
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(f"output={str(self.root)!r} cannot be made: {existing} is not a writable directory")
        if not self.config.exists():
            return
        if not config.checkpoint.resume:
            raise ConfigError(
                f"output={str(self.root)!r} holds another run (its config.toml is there); choose another directory, "
                "or continue that run with --checkpoint.resume"
            )
        old = load_toml(self.config)
        for key, before, now in (
            ("model", old.model.model_dump(), config.model.model_dump()),
            ("seed", {"seed": old.seed}, {"seed": config.seed}),
        ):
            changed = [f"{name}: {before[name]!r} -> {now[name]!r}" for name in now if before[name] != now[name]]
            if changed:
                raise ConfigError(
                    f"checkpoint.resume: the run in {str(self.root)!r} has another {key} ({'; '.join(changed)}); "
                    "use its settings (--config output/config.toml), or another output directory"
                )

    def prepare(self, config: RunConfig) -> None:
        """Make the directory and write the resolved configuration; on rank 0, after every rank has checked."""
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = self.config.with_suffix(".tmp")
        temporary.write_text(to_toml(config))
        temporary.replace(self.config)

    def truncate_metrics(self, steps: int) -> None:
        """Drop metric lines beyond ``steps``: steps that a resumed run will do again."""
        with contextlib.suppress(FileNotFoundError):
            lines = self.metrics.read_text().splitlines()
            kept = lines[:steps]
            if len(kept) < len(lines):
                self.metrics.write_text("".join(line + "\n" for line in kept))
