"""Work that is killed at a random instant: what was there is there, and doing it again ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import hf_folder
import pytest
import torch
from checkpoints import flat_shards, loaded
from corpora import CONVERSATIONS, PLAIN
from killed import Span, killed, span_of, tree
from started_ranks import TINY

from megatron_ds.checkpoint import save
from megatron_ds.checkpoint.directory import steps_in
from megatron_ds.checkpoint.save import prune
from megatron_ds.config import RunConfig, parse
from megatron_ds.convert.hugging_face import export_hf, import_hf
from megatron_ds.data import source_text, sources
from megatron_ds.data.corpus import build_corpus
from megatron_ds.data.indexed_writer import merge_datasets
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.tokenizer_training import train_tokenizer
from megatron_ds.models.families import task_of
from megatron_ds.train.launch import RankInfo
from megatron_ds.train.pretrain import pretrain
from megatron_ds.train.report import read_losses


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has written stays when it is killed: the disk's own time tells nothing here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# --- saving -----------------------------------------------------------------------------------------------------


def write_step(directory: Path, step: int, replace: bool = False, keep_last: int | None = None) -> None:
    save(directory, step, flat_shards(step), {"step": step, "data": [1]}, replace=replace)
    if keep_last is not None:
        prune(directory, step, keep_last)


@pytest.fixture(scope="module")
def saving(tmp_path_factory: pytest.TempPathFactory) -> Span:
    folder = tmp_path_factory.mktemp("saving")
    write_step(folder, 1)
    return span_of(lambda: write_step(folder, 2, keep_last=1))


@pytest.mark.trials(10, 360)
def test_saving(draw: random.Random, saving: Span, place: Path) -> None:
    """At every instant the loader finds a whole checkpoint: the one before, or the new one."""
    before = list(range(1, 1 + draw.randrange(1, 4)))
    for step in before:
        write_step(place, step)
    for _ in range(3):
        newest = loaded(place)
        step = draw.choice((newest + 1, newest, newest + 5))
        options = {"replace": step == newest, "keep_last": draw.choice((None, 1, 2))}
        print(f"step {step}, {options}, beside {[path.name for path in steps_in(place)]}")
        done = not killed(draw, lambda step=step, options=options: write_step(place, step, **options), saving)  # type: ignore[misc]
        assert loaded(place) in ((step,) if done else (newest, step))
        for path in steps_in(place):
            assert loaded(path) == int(path.name.removeprefix("step-").removesuffix(".replaced"))
    write_step(place, 50, keep_last=1)
    assert loaded(place) == 50 and {path.name for path in place.iterdir()} == {"latest", "step-00000050"}


# --- training ---------------------------------------------------------------------------------------------------


def run_of(output: Path, *more: str) -> Callable[[], object]:
    own = ["--train.steps", "8", "--log.no-progress", "--output", str(output)]
    config = parse([*TINY, *own, *more], config_class=RunConfig)
    return lambda: pretrain(config, RankInfo(), task_of(config))


VARIANTS: dict[str, list[str]] = {
    "plain": ["--checkpoint.save-every", "1", "--checkpoint.keep-last", "2"],
    "seldom": ["--checkpoint.save-every", "3", "--train.eval-every", "2", "--train.eval-batches", "1"],
    "dropout": ["--checkpoint.save-every", "2", "--model.hidden-dropout", "0.1", "--model.attention-dropout", "0.1"],
    "swap": ["--checkpoint.save-every", "2", "--zero.stage", "3", "--zero.offload-optimizer.device", "nvme"],
    "data": ["--checkpoint.save-every", "2", "--data.no-synthetic", "--model.vocab-size", "300"],
}


def options_of(variant: str, folder: Path, made: Path) -> list[str]:
    more = {
        "swap": ["--zero.offload-optimizer.path", str(folder / "swap")],
        "data": ["--data.prefix", str(folder / "d" / "text")],
    }
    if variant == "data" and not (folder / "d").exists():
        shutil.copytree(made / "text", folder / "d")
    return [*VARIANTS[variant], *more.get(variant, [])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, made: Path) -> Callable[[str], tuple[Path, Span]]:
    """The uninterrupted run of a variant, made when first asked for."""
    folder, spans = tmp_path_factory.mktemp("runs"), {}

    def of(variant: str) -> tuple[Path, Span]:
        own = folder / variant
        if variant not in spans:
            own.mkdir()
            options = options_of(variant, own, made)
            run_of(own / "run", *options)()  # here, so that forks have imported all that it needs
            spans[variant] = span_of(run_of(own / "again", *options))
        return own / "run", spans[variant]

    return of


@pytest.mark.trials(2, 400)
def test_training(draw: random.Random, runs: Callable[[str], tuple[Path, Span]], made: Path, place: Path) -> None:
    """Killed, resumed, killed again: the same losses and the same weights as in one piece, and no swap file left."""
    variant = draw.choice(sorted(VARIANTS))
    print(variant)
    whole, span = runs(variant)
    output = place / "run"
    options = [*options_of(variant, place, made), "--checkpoint.resume"]
    work = run_of(output, *options)
    for _ in range(draw.choice((1, 1, 2))):
        done = not killed(draw, work, span)
        found = [path.name for path in steps_in(output / "checkpoints")]
        print(f"done: {done}, checkpoints: {found}")
    work()
    assert read_losses(output) == read_losses(whole)
    assert (output / "evaluation.jsonl").exists() == (whole / "evaluation.jsonl").exists()
    final = "checkpoints/step-00000008/rank-00000.safetensors"
    assert (output / final).read_bytes() == (whole / final).read_bytes(), "other weights or optimizer state"
    assert not (place / "swap").exists() or not list((place / "swap").iterdir())


# --- the tools --------------------------------------------------------------------------------------------------


def _preprocess(kind: str) -> Callable[[Path, Path], None]:
    options = PLAIN if kind == "text" else CONVERSATIONS

    def work(made: Path, out: Path) -> None:
        for name in ("MIN_BLOCK", "MAX_BLOCK"):
            setattr(sources, name, 1500)
        source_text.STREAM_BLOCK = 1500
        preprocess([str(made / f"{kind}.jsonl")], out / "data", options, workers=0)

    return work


def _to_hf(made: Path, out: Path) -> None:
    export_hf(made / "imported", out / "hf")


TOOLS: dict[str, Callable[[Path, Path], object]] = {
    "preprocess": _preprocess("text"),
    "preprocess conversations": _preprocess("chat"),
    "merge": lambda made, out: merge_datasets([str(made / "text" / "text")] * 2, out / "data"),
    "from-hf": lambda made, out: import_hf(made / "hf", out / "checkpoints"),
    "to-hf": _to_hf,
    "train_tokenizer": lambda made, out: train_tokenizer([str(made / "text.jsonl")], out / "tokenizer", 400),
    "build_corpus": lambda made, out: build_corpus(out / "corpus.jsonl", None, made / "texts", ".txt"),
}
FINAL = {"from-hf": "checkpoints/step-00000000", "to-hf": "hf", "train_tokenizer": "tokenizer"}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory, made: Path) -> Callable[[str], tuple[Path, Span]]:
    """What a tool makes undisturbed."""
    hf_folder.write(made / "hf")
    import_hf(made / "hf", made / "imported")
    (made / "texts").mkdir()
    for i in range(20):
        (made / "texts" / f"{i}.txt").write_text(f"text {i}\n")
    folder, spans = tmp_path_factory.mktemp("tools"), {}

    def of(tool: str) -> tuple[Path, Span]:
        own = folder / tool
        if tool not in spans:
            own.mkdir()
            TOOLS[tool](made, place_like(own, "warm"))
            spans[tool] = span_of(lambda: TOOLS[tool](made, place_like(own, "whole")))
        return own / "whole", spans[tool]

    return of


def place_like(folder: Path, name: str) -> Path:
    (folder / name).mkdir(exist_ok=True)
    return folder / name


@pytest.mark.trials(1, 60)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool(
    draw: random.Random, tools: Callable[[str], tuple[Path, Span]], made: Path, place: Path, tool: str
) -> None:
    """The same command once more gives what it would have given; until then nothing looks finished that is not."""
    whole, span = tools(tool)
    again = killed(draw, lambda: TOOLS[tool](made, place), span)
    want = tree(whole)
    found = tree(place)
    final = FINAL.get(tool, "")
    for name in [name for name in found if final and name.startswith(f"{final}/")]:
        assert found[name] == want.get(name), f"{name} stands there, half made"
    if tool in ("merge", "preprocess", "preprocess conversations") and "data.idx" in found:
        assert found["data.idx"] == want["data.idx"] and found["data.bin"] == want["data.bin"]
    if not again or (final and (place / final).exists()):
        return
    TOOLS[tool](made, place)
    found = tree(place)
    told = {name for name in found if name.endswith("manifest.json")}  # hold paths, or times
    assert found.keys() == want.keys(), "something is left over, or missing"
    # Sums hold times, and the names in a header of safetensors have no order of their own.
    assert [name for name in want if name not in told and found[name] != want[name] and name != "data.sums"] == []
    for name in told:
        json.loads(found[name])
    assert torch.is_grad_enabled()
