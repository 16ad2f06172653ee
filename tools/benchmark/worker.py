"""One rank of one contestant, in a fresh process: build it, run it, report. Started by run.py, in either environment.

python tools/benchmark/worker.py NAME --dtype fp32 [--rank 0 --ranks 2 --rendezvous FILE]
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from setting import Workload, measure, report

Builder = Callable[[Workload], Callable[[], Any]]


def builders() -> dict[str, Builder]:
    """Every contestant by name. A module is imported only if one of its contestants is asked for."""

    def of(module: str, function: str, *args: Any, **kwargs: Any) -> Builder:
        def make(w: Workload) -> Callable[[], Any]:
            step: Callable[[], Any] = getattr(_sibling(module), function)(w, *args, **kwargs)
            return step

        return make

    plain = partial(of, "plain", "plain")
    peer = partial(of, "peers")
    ours = partial(of, "ours", "training_step")

    def zero(stage: int, offload: str = "none") -> Builder:
        """Data-parallel over all ranks of the run, however many those are."""
        return lambda w: ours(dp=dist.get_world_size(), zero=stage, offload=offload)(w)

    return {
        "plain": plain(False),
        "plain-compile": plain(True),
        "huggingface": peer("huggingface"),
        "ddp": peer("ddp"),
        "zero-redundancy": peer("zero_redundancy"),
        "deepspeed-zero1": peer("deepspeed", 1),
        "deepspeed-zero2": peer("deepspeed", 2),
        "deepspeed-zero3": peer("deepspeed", 3),
        "deepspeed-zero2-offload": peer("deepspeed", 2, offload=True),
        "fsdp2": peer("fsdp2"),
        "dtensor-tp": peer("dtensor_tp", False),
        "dtensor-tp-sp": peer("dtensor_tp", True),
        "torch-1f1b-3+3": peer("torch_pipeline", (3, 3)),
        "torch-1f1b-4+2": peer("torch_pipeline", (4, 2)),
        "ours": ours(),
        "ours-compile": ours(compiled=True),
        "ours-alone": of("ours", "alone"),
        "ours-zero1": zero(1),
        "ours-zero2": zero(2),
        "ours-zero3": zero(3),
        "ours-zero2-offload": zero(2, "cpu"),
        "ours-tp": ours(tp=2),
        "ours-tp-sp": ours(tp=2, sequence_parallel=True),
        "ours-1f1b-3+3": ours(pp=2, layers_per_stage=(3, 3)),
        "ours-1f1b-4+2": ours(pp=2, layers_per_stage=(4, 2)),
    }


def _sibling(name: str) -> ModuleType:
    """A module of this folder, after which the folder is out of sight: it holds a ``kernels.py``, and a module of that
    name on the path makes transformers believe that Hugging Face's package is installed."""
    module = importlib.import_module(name)
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [folder for folder in sys.path if folder != here]
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one rank of one contestant.")
    parser.add_argument("name", choices=sorted(builders()))
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "bf16-pure"])
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of this rank")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rendezvous", help="a file that does not exist yet, shared by the ranks of this run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    w = replace(Workload(), dtype=args.dtype)
    if args.ranks > 1:
        # Some peers read these instead of asking the process group.
        os.environ.update(RANK=str(args.rank), LOCAL_RANK=str(args.rank), WORLD_SIZE=str(args.ranks))
        store = dist.FileStore(args.rendezvous, args.ranks)
        dist.init_process_group("gloo", store=store, rank=args.rank, world_size=args.ranks)
    figures = measure(builders()[args.name](w), w, args.warmup, args.steps)
    if args.ranks > 1:
        everyone: list[Any] = [None] * args.ranks
        dist.all_gather_object(everyone, figures)
        figures["rss_mib"] = max(f["rss_mib"] for f in everyone)
        figures["cpu_tokens_per_s"] = min(f["cpu_tokens_per_s"] for f in everyone)
        figures["loss"] = next(f["loss"] for f in everyone if f["loss"])
        dist.barrier()
    if args.rank == 0:
        report({"name": args.name, "torch": torch.__version__, **figures}, w)
    if args.ranks > 1:
        os._exit(0)  # DDP's threads abort, now and then, a process that ends in the ordinary way


if __name__ == "__main__":
    main()
