"""What the pretraining examples of all families have in common: options, dry run, run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_ds.config import BaseRunConfig, parse, to_toml
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.errors import ConfigError, MegatronDSError
from megatron_ds.train.dry_run import dry_run
from megatron_ds.train.initial_weights import check_model, model_defaults
from megatron_ds.train.launch import RankInfo
from megatron_ds.train.layout_table import layouts
from megatron_ds.train.pretrain import pretrain
from megatron_ds.train.task import Task

R = TypeVar("R", bound=BaseRunConfig)


def run_pretraining(place: RankInfo, config_class: type[R], task_of: Callable[[R], Task], description: str) -> int:
    """Do what this process's command line says: show the settings, lay out one rank, or train."""
    arguments = sys.argv[1:]
    show = "--print-config" in arguments
    dry = "--dry-run" in arguments
    compare = dry and "--layouts" in arguments
    arguments = [a for a in arguments if a not in ("--print-config", "--dry-run", *["--layouts"] * compare)]
    world_size, rank = (_take(arguments, "--world-size"), _take(arguments, "--rank")) if dry else (None, None)
    gpu_gb = _take(arguments, "--gpu-gb") if compare else None
    config = parse(arguments, description, _defaults, config_class)
    if show:
        print(to_toml(config), end="")
        return 0
    task = task_of(config)
    if dry:
        check_model(config)
        m = config.mesh
        ranks = m.tp * m.pp * m.cp * (m.dp or 1) if world_size is None else world_size
        print(layouts(config, task_of, ranks, gpu_gb or 80) if compare else dry_run(config, task, ranks, rank or 0))
        return 0
    pretrain(config, place, task)
    return 0


def _defaults(config: BaseRunConfig) -> dict[str, Any]:
    """Settings that follow from others: the model from the checkpoint that a run starts from, else the vocabulary from
    the tokenizer. One that cannot be read is named later, on all ranks alike."""
    spec = getattr(config.data, "tokenizer", None)
    if config.checkpoint.init_from is not None or spec is None:
        return model_defaults(config)
    with contextlib.suppress(MegatronDSError):
        return {"model": {"vocab_size": load_tokenizer(spec, fast=False).vocab_size}}
    return {}


def _take(arguments: list[str], flag: str) -> int | None:
    """Remove ``flag VALUE`` from the arguments and return the value as a number."""
    if flag not in arguments:
        return None
    at = arguments.index(flag)
    value = arguments[at + 1 : at + 2]
    # Nine digits are more than any number of ranks.
    if not value or not (value[0].isascii() and value[0].isdigit() and len(value[0]) < 10):
        raise ConfigError(f"{flag} needs a number, as in {flag} 8")
    del arguments[at : at + 2]
    return int(value[0])
