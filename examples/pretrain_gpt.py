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
from pathlib import Path
from typing import Any

from megatron_ds.config import RunConfig, parse, to_toml
from megatron_ds.data.gpt_sources import GPTSources, SampleOptions, open_sources
from megatron_ds.data.masked_source import mask_sources
from megatron_ds.errors import ConfigError
from megatron_ds.models.families import model_of
from megatron_ds.train.dry_run import dry_run
from megatron_ds.train.initial_weights import check_model, model_defaults
from megatron_ds.train.launch import RankInfo, run_main
from megatron_ds.train.pretrain import pretrain


def sources(config: RunConfig) -> GPTSources:
    """The data that ``config.data`` describes, masked where the model predicts masked tokens."""
    data, found = config.data, _texts(config)
    if config.model.causal:
        return found
    common: dict[str, Any] = {"vocab_size": config.model.vocab_size, "seed": config.seed, "tokenizer": data.tokenizer}
    return mask_sources(found, mask_id=data.mask_token, probability=data.mask_probability, **common)


def _texts(config: RunConfig) -> GPTSources:
    data = config.data
    common: dict[str, Any] = {
        "split": data.split,
        "sequence_length": config.train.sequence_length,
        "vocab_size": config.model.vocab_size,
        "seed": config.seed,
        "tokenizer": data.tokenizer,
    }
    if data.synthetic:
        return open_sources(**common)
    own = {"train": data.train_blend, "valid": data.valid_blend, "test": data.test_blend}
    return open_sources(
        data.prefix,
        blend=data.blend,
        split_blends=own if data.train_blend else None,
        options=SampleOptions(
            data.document_masking, data.conversations, data.fim.rate, data.fim.spm_rate, data.fim.tokens
        ),
        cache_dir=None if data.cache_dir is None else Path(data.cache_dir),
        **common,
    )


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
    config = parse(arguments, __doc__, model_defaults)
    if show:
        print(to_toml(config), end="")
        return 0
    model = model_of(config)
    if dry:
        check_model(config)
        m = config.mesh
        ranks = m.tp * m.pp * m.cp * (m.dp or 1) if world_size is None else world_size
        print(dry_run(config, model, ranks, rank or 0))
        return 0
    pretrain(config, place, model, sources)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
