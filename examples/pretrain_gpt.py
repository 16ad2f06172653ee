"""Pretrain a GPT (GPT-2, GPT-3, Llama, BLOOM by configuration) or a BERT on any mesh of ranks.

    python examples/pretrain_gpt.py --config examples/configs/demo.toml --data.prefix runs/data/corpus
    torchrun --nproc-per-node 8 examples/pretrain_gpt.py --config examples/configs/gpt2-345m.toml --mesh.tp 2

Besides the settings below:

    --config FILE    settings from a TOML file; options given beside it win
    --print-config   print the resolved settings as TOML and stop
    --dry-run        build one rank of the mesh without memory or other processes: layout, exact bytes, bubble
                     (--world-size N, default the mesh's product; --rank R, default 0)
"""

from __future__ import annotations

import sys

from megatron_ds.config import RunConfig, parse, to_toml
from megatron_ds.errors import ConfigError
from megatron_ds.models.families import task_of
from megatron_ds.train.dry_run import dry_run
from megatron_ds.train.initial_weights import check_model, model_defaults
from megatron_ds.train.launch import RankInfo, run_main
from megatron_ds.train.pretrain import pretrain


def take(arguments: list[str], flag: str) -> int | None:
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


def main(place: RankInfo) -> int:
    arguments = sys.argv[1:]
    show = "--print-config" in arguments
    dry = "--dry-run" in arguments
    arguments = [a for a in arguments if a not in ("--print-config", "--dry-run")]
    world_size, rank = (take(arguments, "--world-size"), take(arguments, "--rank")) if dry else (None, None)
    config = parse(arguments, __doc__, model_defaults, RunConfig)
    if show:
        print(to_toml(config), end="")
        return 0
    task = task_of(config)
    if dry:
        check_model(config)
        m = config.mesh
        ranks = m.tp * m.pp * m.cp * (m.dp or 1) if world_size is None else world_size
        print(dry_run(config, task, ranks, rank or 0))
        return 0
    pretrain(config, place, task)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
