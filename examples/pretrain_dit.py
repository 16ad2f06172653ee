"""Train a diffusion transformer (DiT) on any mesh of ranks.

    python examples/pretrain_dit.py --config examples/configs/diffusion/digits.toml
    torchrun --nproc-per-node 8 examples/pretrain_dit.py --config examples/configs/diffusion/digits.toml --mesh.tp 2

Besides the settings below:

    --config FILE    settings from a TOML file; options given beside it win
    --print-config   print the resolved settings as TOML and stop
    --dry-run        build one rank of the mesh without memory or other processes: layout, exact bytes, bubble
                     (--world-size N, default the mesh's product; --rank R, default 0)
    --dry-run --layouts    compare what every mesh of these ranks needs at each ZeRO stage (--gpu-gb N, default 80)
"""

from __future__ import annotations

import sys

from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.models.dit_task import DiTTask
from megatron_ds.train.entry import run_pretraining
from megatron_ds.train.launch import RankInfo, run_main


def main(place: RankInfo) -> int:
    return run_pretraining(place, DiffusionRun, DiTTask, __doc__)


if __name__ == "__main__":
    sys.exit(run_main(main))
