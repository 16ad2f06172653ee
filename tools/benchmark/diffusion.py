"""Training speed of a diffusion transformer on this machine's CPU, beside a plain loop over the model of diffusers.

Two models: that of `make train-diffusion` (8 x 8 pixels), and DiT-S/8 (latents of 32 x 32 x 4), both on steps of 2,048
tokens as GPT's rows in `run.py` have them. Both loops predict the noise of the same images, with AdamW and clipping;
bf16 is autocast in the plain loop. Contenders run one after the other, each in processes of its own with one thread a
rank, and the table shows the median and the range of the rounds' ratios: of one process to the plain loop, of two ranks
to twice what one of ours does in the same round. Ratios by the first rank's CPU time are what is left on a machine that
others use too. Two ranks that exchange nothing are what the machine allows. With ``--gpt`` a language model of as many
layers, as wide, on as many tokens in sequences as long, goes through the same contenders. ``--compile`` is the setting
of a run, for all but the plain loop. ``--turns`` compares one and two ranks of ours more closely: all in the same two
processes, a few steps in turn, by the first rank's CPU time alone.

python tools/benchmark/diffusion.py --rounds 3 --json diffusion.json
python tools/benchmark/diffusion.py --rounds 1 --only fp32 digits --gpt
python tools/benchmark/diffusion.py --turns --rounds 9 --only fp32 DiT-S/8 --gpt
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ours import alone, training_step
from setting import Workload
from tqdm import tqdm

BATCH, SECONDS = 128, 5.0
MODELS: dict[str, dict[str, Any]] = {
    "digits": {"hidden_size": 96, "num_layers": 4, "num_heads": 4, "image_size": 8, "channels": 1, "patch_size": 2,
               "num_classes": 10},
    "DiT-S/8": {"hidden_size": 384, "num_layers": 12, "num_heads": 6, "image_size": 32, "channels": 4, "patch_size": 8,
                "num_classes": 1000},
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "diffusers": {},
    "ours": {},
    "ours apart": {"apart": 2},
    "ours ZeRO-1": {"dp": 2},
    "ours TP 2": {"tp": 2},
    "ours TP 2 + SP": {"tp": 2, "sequence_parallel": True},
}
GPT = "GPT as "
ONE, APART = "ours", "ours apart"

Step = Callable[[], float]


def batch_of(model: dict[str, Any], count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, model["channels"], model["image_size"], model["image_size"])
    return {
        "images": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "time": torch.rand(count, generator=generator, dtype=torch.float64),
        "labels": torch.randint(model["num_classes"], (count,), generator=generator),
        "counts": torch.ones(count, dtype=torch.bool),
    }


def plain(model: dict[str, Any], dtype: str) -> Step:
    """The loop that one would write around the model of diffusers."""
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=model["num_heads"],
        attention_head_dim=model["hidden_size"] // model["num_heads"],
        in_channels=model["channels"],
        out_channels=model["channels"],
        num_layers=model["num_layers"],
        sample_size=model["image_size"],
        patch_size=model["patch_size"],
        num_embeds_ada_norm=model["num_classes"],
    ).train()
    schedule = DDPMScheduler()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    batch = batch_of(model, BATCH)
    times = (batch["time"] * len(schedule)).long()

    def step() -> float:
        noisy = schedule.add_noise(batch["images"], batch["noise"], times)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            found = net(noisy, timestep=times, class_labels=batch["labels"]).sample
        loss = (found.float() - batch["noise"]).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def ours(model: dict[str, Any], dtype: str, layout: dict[str, Any], compiled: bool) -> Step:
    from megatron_ds.config import from_dict, validate
    from megatron_ds.config.diffusion import DiffusionRun
    from megatron_ds.kernels.cpu.allocator import keep_freed_memory, map_large_tensors
    from megatron_ds.mesh import Mesh
    from megatron_ds.models.dit_task import DiTTask
    from megatron_ds.train.build import build

    map_large_tensors()
    layout = dict(layout)
    size = BATCH // layout.get("dp", 1) // (apart := layout.pop("apart", 1))
    ranks = max(layout.values(), default=1)
    settings = {
        "output": tempfile.gettempdir() + "/megatron-ds-benchmark",  # nothing is written there
        "compile": compiled,
        "model": model,
        "mesh": {"sequence_parallel": False, **layout},
        "optimizer": {"lr": 1e-4, "clip_norm": 1.0, "schedule": "constant", "weight_decay": 0.01},
        "precision": {"dtype": dtype},
        "train": {"global_batch": BATCH // apart, "micro_batch": size},
    }
    config = from_dict(DiffusionRun, settings, "benchmark")
    mesh = Mesh.create(validate(config, ranks), torch.device("cpu"))
    parts = build(config, mesh, DiTTask(config))
    parts.step.after_first = keep_freed_memory
    own = {name: value[mesh.dp.rank * size :][:size] for name, value in batch_of(model, BATCH).items()}
    return lambda: float(parts.step([own]).loss)


def gpt(model: dict[str, Any], dtype: str, layout: dict[str, Any], compiled: bool) -> Step:
    """A language model of a diffusion transformer's shape; its head has 64 words, a patch about as many numbers."""
    patches = (model["image_size"] // model["patch_size"]) ** 2
    sizes = {"layers": model["num_layers"], "hidden": model["hidden_size"], "heads": model["num_heads"]}
    workload = Workload(**sizes, sequence=patches, vocab=64, batch=BATCH, dtype=dtype)
    ranks = max(layout.values(), default=1)
    if "apart" in layout:
        step = alone(workload, compiled=compiled)
    else:
        step = training_step(workload, world_size=ranks, compiled=compiled, **layout)
    return lambda: float(step())


def make_step(name: str, model: str, dtype: str, compiled: bool = False) -> Step:
    if name == "diffusers":
        return plain(MODELS[model], dtype)
    make = gpt if model.startswith(GPT) else ours
    return make(MODELS[model.removeprefix(GPT)], dtype, LAYOUTS[name], compiled)


def measure(name: str, model: str, dtype: str, *, compiled: bool) -> None:
    """Print images a second, on the first rank."""
    torch.set_num_threads(1)
    layout = LAYOUTS[name]
    if layout:
        dist.init_process_group("gloo")
    step = make_step(name, model, dtype, compiled)
    first = step()
    times: list[tuple[float, float]] = []
    # Of several ranks all stop after as many steps: the first one's clock decides beforehand.
    begin = time.perf_counter()
    step()
    count = max(3, int(SECONDS / (time.perf_counter() - begin)))
    if layout:
        counts = torch.tensor([count])
        dist.broadcast(counts, 0)
        count = int(counts)
    for _ in range(count):
        begin, cpu = time.perf_counter(), time.process_time()
        last = step()
        times.append((time.perf_counter() - begin, time.process_time() - cpu))
    if not layout or dist.get_rank() == 0:
        rate, by_cpu = (BATCH / statistics.median(of) for of in zip(*times))
        print(json.dumps({"rate": rate, "by_cpu": by_cpu, "first": first, "last": last}), flush=True)


def run(name: str, model: str, dtype: str, compiled: bool) -> dict[str, float]:
    ranks = max(LAYOUTS[name].values(), default=1)
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, __file__, "--measure", name, model, dtype, *["--compile"] * compiled]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{name} ({model}, {dtype}) has failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def take_turns(models: list[str], dtype: str, rounds: int, *, compiled: bool) -> None:
    """In each of two ranks: every contender takes a few steps in turn, and rank 0 prints the medians of ratios."""
    names = [name for name in LAYOUTS if name != "diffusers"]
    cases = [(model, name) for model in models for name in names]
    steps: dict[tuple[str, str], Step] = {}
    counts: dict[tuple[str, str], int] = {}
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for model, name in cases:
        if name != ONE or dist.get_rank() == 0:  # while the other waits
            step = steps[model, name] = make_step(name, model, dtype, compiled)
            step()
            begin = time.perf_counter()
            step()
            counts[model, name] = max(2, int(1.0 / (time.perf_counter() - begin)))
        agreed = torch.tensor([counts.get((model, name), 0)])
        dist.broadcast(agreed, 0)
        counts[model, name] = int(agreed)
    for number in range(rounds):
        for model, name in cases[number % len(cases) :] + cases[: number % len(cases)]:
            dist.barrier()
            if (model, name) in steps:
                begin = time.process_time()
                for _ in range(counts[model, name]):
                    steps[model, name]()
                times[model, name].append((time.process_time() - begin) / counts[model, name])
    dist.barrier()
    if dist.get_rank() == 0:
        _show_turns(times, dtype)


def _show_turns(times: dict[tuple[str, str], list[float]], dtype: str) -> None:
    print(f"{'model':<16}{'':<6}{'contender':<18}{'ms a step':>10}{'to twice one':>14}{'range':>11}{'to apart':>10}")
    for (model, name), own in times.items():
        one, apart = times[model, ONE], times[model, APART]
        ratios = [b / a / (1 if name == ONE else 2) for a, b in zip(own, one)]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        to_apart = statistics.median(b / a for a, b in zip(own, apart))
        milliseconds = statistics.median(own) * 1e3
        figures = f"{milliseconds:>10.1f}{statistics.median(ratios):>14.3f}{spread:>11}{to_apart:>10.3f}"
        print(f"{model:<16}{dtype:<6}{name:<18}{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="each runs every contender once; %(default)s")
    parser.add_argument("--only", nargs="+", default=[], help="of fp32 and bf16, digits and DiT-S/8, contenders; all")
    parser.add_argument("--gpt", action="store_true", help="language models of the same shapes beside them")
    parser.add_argument("--compile", action="store_true", help="compile what products of matrices leave")
    parser.add_argument("--turns", action="store_true", help="ours on one and two ranks, in turns in two processes")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure, compiled=options.compile)
        return
    dtypes = [dtype for dtype in ("fp32", "bf16") if dtype in options.only] or ["fp32", "bf16"]
    models = [model for model in MODELS if model in options.only] or list(MODELS)
    names = [name for name in LAYOUTS if name in options.only] or list(LAYOUTS)
    models = [kind + model for model in models for kind in ("", GPT)[: 1 + options.gpt]]
    if options.turns:
        if "RANK" not in os.environ:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            sys.exit(subprocess.run([*launcher, *sys.argv], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        for dtype in dtypes:
            take_turns(models, dtype, options.rounds, compiled=options.compile)
        return
    cases = [
        (name, model, dtype)
        for dtype in dtypes
        for model in models
        for name in names
        if name != "diffusers" or model in MODELS
    ]
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    with tqdm(total=options.rounds * len(cases), unit="run") as bar:
        for _ in range(options.rounds):
            for case in cases:
                bar.set_description(", ".join(case))
                found.setdefault(case, []).append(run(*case, options.compile))
                bar.update()
    print(f"{'model':<16}{'':<6}{'contender':<18}{'images/s':>10}{'ratio':>8}{'range':>11}{'by CPU time':>13}  of")
    for (name, model, dtype), runs in found.items():
        other = "ours" if " " in name or model not in MODELS else "diffusers"
        if other not in names:
            continue
        factor = 2.0 if " " in name else 1.0
        pairs = list(zip(runs, found[other, model, dtype]))
        ratios, by_cpu = ([own[of] / (factor * base[of]) for own, base in pairs] for of in ("rate", "by_cpu"))
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        said = "2 x ours on one process" if " " in name else other
        rate = statistics.median(own["rate"] for own in runs)
        figures = f"{rate:>10.1f}{statistics.median(ratios):>8.3f}{spread:>11}{statistics.median(by_cpu):>13.3f}"
        print(f"{model:<16}{dtype:<6}{name:<18}{figures}  {said}")
    if options.json:
        options.json.write_text(json.dumps([[*key, runs] for key, runs in found.items()]) + "\n")


if __name__ == "__main__":
    main()
