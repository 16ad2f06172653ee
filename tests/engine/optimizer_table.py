"""The table of optimizers in megatron_ds/optim/README.md: each one is right on an engine, or refused by name.

Runs where the packages are (an environment of its own, with torch by this project's pin); writes Markdown to standard
output. Every optimizer trains a small float64 model by plain torch and by an engine, whole and continued from a
checkpoint, at the given stages.
"""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[2]))

import optimizer_cases as cases

import megatron_ds
from megatron_ds.errors import MegatronDSError
from megatron_ds.testing import run_ranks

PACKAGES = ("torch.optim", "schedulefree", "prodigyopt", "pytorch_optimizer")
STAGES, TOLERANCE = (1, 2, 3), 1e-9


def classes(package: str) -> Iterator[tuple[str, Any]]:
    module = importlib.import_module(package)
    if package == "pytorch_optimizer":
        yield from ((name, module.load_optimizer(name)) for name in sorted(module.get_supported_optimizers()))
        return
    for name in sorted(vars(module)):
        found = getattr(module, name)
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer:
            yield name, found


def run(package: str, name: str, ranks_folder: str) -> dict[Any, Any]:
    """On one rank: what came of each stage, whole and continued."""
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr  # some of them print
    make = functools.partial(made, package, name)
    found: dict[Any, Any] = {}
    for stage in STAGES:
        for resumed in (False, True):
            folder = f"{ranks_folder}/{stage}" if resumed else None
            try:
                found[stage, resumed] = cases.run(make, stage, folder)[:2]
            except MegatronDSError as error:
                return {"refused": str(error)}
    return found


def made(package: str, name: str, params: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = dict(classes(package))[name](params)
    return optimizer


def refused_at_once(make: Any) -> str | None:
    """What initialize() says of one that takes no groups, or no step without a closure."""
    net = cases.model()
    try:
        megatron_ds.initialize(net, None, make(net.parameters())).close()
    except MegatronDSError as error:
        return _reason(str(error))
    except Exception:
        return None
    return None


def _reason(text: str) -> str:
    return "refused: " + " ".join(text.split("sharded parameters: ")[-1].split("; use an")[0].split())[:170]


def verdict(package: str, name: str) -> str:
    make = functools.partial(made, package, name)
    try:
        want = cases.plain(make)
    except Exception as error:
        return refused_at_once(make) or f"does not run by plain torch on this model: {type(error).__name__}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            ranks = run_ranks(run, 2, package, name, folder, timeout=60)
        except AssertionError as error:
            return f"**fails**: {str(error).strip().splitlines()[-1][:150]}"
    worst = {False: 0.0, True: 0.0}
    for found in ranks:
        if "refused" in found:
            return _reason(found["refused"])
        for (_, resumed), looked in found.items():
            for got, right in zip(looked, want):
                gaps = [float((got[key] - value).abs().max()) for key, value in right.items()]
                worst[resumed] = float(np.max([worst[resumed], *gaps]))  # a NaN is the largest
    good = all(gap < TOLERANCE for gap in worst.values())
    return f"{'right' if good else '**wrong**'} | {worst[False]:.0e} | {worst[True]:.0e}"


def main() -> None:
    for package in sys.argv[1:] or PACKAGES:
        print(f"\n{package} | | whole | continued\n---|---|---|---", flush=True)
        for name, _ in classes(package):
            print(f"{name} | {verdict(package, name)}", flush=True)


if __name__ == "__main__":
    main()
