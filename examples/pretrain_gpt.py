"""Pretrain a GPT (GPT-2, GPT-3, Llama, BLOOM by configuration) or a BERT on any mesh of ranks.

    python examples/pretrain_gpt.py --config examples/configs/demo.toml --data.prefix runs/data/corpus
    torchrun --nproc-per-node 8 examples/pretrain_gpt.py --config examples/configs/gpt2-345m.toml --mesh.tp 2

Besides the settings below:

    --config FILE    settings from a TOML file; options given beside it win
    --print-config   print the resolved settings as TOML and stop
    --dry-run        build one rank of the mesh without memory or other processes: layout, exact bytes, bubble
                     (--world-size N, default the mesh's product; --rank R, default 0)
    --dry-run --layouts    compare what every mesh of these ranks needs at each ZeRO stage (--gpu-gb N, default 80)
"""

from __future__ import annotations

import sys

from megatron_ds.config import RunConfig
from megatron_ds.models.families import task_of
from megatron_ds.train.entry import run_pretraining
from megatron_ds.train.launch import RankInfo, run_main


def main(place: RankInfo) -> int:
    return run_pretraining(place, RunConfig, task_of, __doc__)


if __name__ == "__main__":
    sys.exit(run_main(main))
