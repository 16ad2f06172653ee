"""What a rank of examples/pretrain_dit.py runs, in a module that imports nothing else: each rank imports it."""

from __future__ import annotations

from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.models.dit_task import DiTTask
from megatron_ds.train.entry import run_pretraining
from megatron_ds.train.launch import RankInfo


def main(place: RankInfo) -> int:
    return run_pretraining(place, DiffusionRun, DiTTask, "")
