"""Bad input through the real entry point: one clear error, exit code 2, nothing lost, overwritten or left behind."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import planted_faults
import pytest
from started_ranks import TINY, started

from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.preprocess import PreprocessOptions, preprocess
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.train.report import read_losses

if TYPE_CHECKING:
    from entry_point import Run

pytest_plugins = ["entry_point"]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- the command line and the mesh ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh.tp", "2"], "world_size=1 cannot be divided by pp=1 x cp=1 x tp=2 = 2; start 2 ranks, or change"),
        (["--model.num-heads", "3"], "model.hidden_size=16 is not a multiple of model.num_heads=3"),
        (["--train.micro-batch", "3"], "train.global_batch=4 is not a multiple of train.micro_batch=3"),
        (["--model.num-layrs", "3"], "unknown option --model.num-layrs; did you mean '--model.num-layers'?"),
        (["--optimizer.lr", "fast"], "optimizer.lr"),
        (["--config", "nowhere.toml"], "--config nowhere.toml: no such file"),
        (["--data.no-synthetic"], "data.prefix is not set"),
        (["--dry-run", "--world-size", "x"], "--world-size needs a number"),
        (["--dry-run", "--world-size", "0"], "world_size=0 is no number of ranks; start 1 to"),
        (["--dry-run", "--world-size", "-8"], "--world-size needs a number"),
        (["--dry-run", "--world-size", "\u0662"], "--world-size needs a number"),
        (["--dry-run", "--world-size", "999999999"], "world_size=999999999 is no number of ranks"),
        (["--data.prefix", "corpus"], "data.prefix='corpus' does nothing: data.synthetic makes up the tokens"),
    ],
)
def test_what_cannot_run_is_refused(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run("--output", str(tmp_path / "run"), *arguments)
    assert done.code == 2 and message in done.error
    assert not list(tmp_path.iterdir())


def test_all_that_tensor_parallelism_cannot_divide_is_said_at_once_for_all_ranks(tmp_path: Path) -> None:
    wrong = [
        "--model.num-heads",
        "3",
        "--model.kv-heads",
        "1",
        "--model.head-dim",
        "4",
        "--model.vocab-multiple",
        "1",
        "--train.sequence-length",
        "7",
    ]
    own = [*TINY, "--mesh.tp", "2", "--output", str(tmp_path / "run"), *wrong, "--model.ffn-hidden-size", "33"]
    with started(tmp_path / "log", [own, own]) as ranks:
        assert ranks.wait() == [2, 2]
        text = ranks.output(0)
        for part in (
            "model.kv_heads=1 cannot be split over mesh.tp=2",
            "model.ffn_hidden_size=33 cannot be split over mesh.tp=2",
            "the vocabulary padded to 61 (model.vocab_size=61, model.vocab_multiple=1) cannot be split",
            "train.sequence_length=7 cannot be split over mesh.tp=2 for sequence parallelism",
        ):
            assert ranks.everything().count(part) == 1, text
        assert text.count("error: ") == 1 and ranks.output(1) == ""
    assert not (tmp_path / "run").exists()


def test_stages_without_layers_and_batches_without_samples_are_refused_on_all_ranks(tmp_path: Path) -> None:
    own = [*TINY, "--mesh.pp", "3", "--train.global-batch", "3", "--train.micro-batch", "2"]
    with started(tmp_path / "log", [[*own, "--output", str(tmp_path / "run")]] * 3) as ranks:
        assert ranks.wait() == [2, 2, 2]
        assert "model.num_layers=2 cannot fill 3 stages (mesh.pp)" in ranks.output(0)
        assert "train.global_batch=3 is not a multiple of train.micro_batch=2 x dp=1" in ranks.output(0)
        assert ranks.everything().count("error: ") == 1


# --- data -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """The prefix of a dataset of 20 documents of 50 tokens below 61."""
    prefix = tmp_path / "data" / "text"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in range(20):
            writer.add_document(np.arange(document, document + 50) % 61)
    return prefix


def _cut(path: Path, to: int) -> None:
    os.truncate(path, to)


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: list[tuple[str, Callable[[Path, Path], object], list[str], str]] = [
    ("no bin", lambda b, i: b.unlink(), [], "text.bin does not exist; text.idx is there"),
    ("no idx", lambda b, i: i.unlink(), [], "text.idx does not exist; text.bin is there"),
    ("neither", lambda b, i: (b.unlink(), i.unlink()), [], "text.idx does not exist."),
    ("empty bin", lambda b, i: _cut(b, 0), [], "text.bin is empty: text.idx says it has 2000 bytes, found 0"),
    ("empty idx", lambda b, i: _cut(i, 0), [], "text.idx is empty: expected at least 34 bytes, found 0"),
    ("short bin", lambda b, i: _cut(b, 1998), [], "text.bin is truncated"),
    ("short idx", lambda b, i: _cut(i, 100), [], "It is truncated: copy it again"),
    ("flipped idx", lambda b, i: _flip(i, 3), [], "is not a dataset index"),
    (
        "vocabulary",
        lambda b, i: None,
        ["--model.vocab-size", "60"],
        "has token id 60 at token 599 (document 11",
    ),
    ("tokenizer", lambda b, i: None, ["--data.tokenizer", "bytes"], "has 257 entries, but model.vocab_size=61"),
    ("no tokenizer", lambda b, i: None, ["--data.tokenizer", "nowhere"], "tokenizer='nowhere' does not exist"),
    ("too short", lambda b, i: None, ["--train.sequence-length", "1000"], "Use sequence_length <= 999"),
    ("short split", lambda b, i: None, ["--data.split", "999,1"], "for valid"),
]


@pytest.mark.parametrize(("damage", "arguments", "message"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_data_that_cannot_be_trained_on(
    run: Run,
    tmp_path: Path,
    dataset: Path,
    damage: Callable[[Path, Path], object],
    arguments: list[str],
    message: str,
) -> None:
    prefix = ["--data.no-synthetic", "--data.prefix", str(dataset), "--data.split", "1"]
    damage(dataset.with_suffix(".bin"), dataset.with_suffix(".idx"))
    before = snapshot(tmp_path)
    done = run("--model.max-positions", "2000", *prefix, "--output", str(tmp_path / "run"), *arguments)
    assert done.code == 2 and message in done.error, done.error
    after = snapshot(tmp_path)
    assert before.items() <= after.items()
    assert {Path(name).name for name in after.keys() - before.keys()} <= {"text.sums"}
    assert not (tmp_path / "run").exists()


def test_the_dataset_of_another_tokenizer(run: Run, tmp_path: Path) -> None:
    from megatron_ds.data.tokenizer_training import train_tokenizer

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one two three four five six seven eight nine ten\n" * 200)
    for name, size in (("mine", 280), ("other", 300)):
        train_tokenizer([str(corpus)], tmp_path / name, vocab_size=size)
    preprocess([str(corpus)], tmp_path / "text", PreprocessOptions(str(tmp_path / "mine"), append_eod=True))
    common = ["--model.vocab-size", "300", "--data.no-synthetic", "--data.prefix", str(tmp_path / "text")]
    common += ["--data.split", "1", "--output", str(tmp_path / "run")]
    done = run(*common, "--data.tokenizer", str(tmp_path / "other"))
    assert done.code == 2 and "was made with the tokenizer" in done.error and str(tmp_path / "mine") in done.error
    assert not (tmp_path / "run").exists()
    assert run(*common, "--data.tokenizer", str(tmp_path / "mine")).code == 0
    common[-1] = str(tmp_path / "unnamed")
    assert (
        f"vocab_size=400, of which the tokenizer {tmp_path / 'mine'} has"
        in run(*common, *["--model.vocab-size", "400"]).out
    )
    for name in ("run", "unnamed"):
        kept = load_tokenizer(tmp_path / name / "checkpoints" / "tokenizer")
        assert kept.fingerprint == load_tokenizer(tmp_path / "mine").fingerprint


def test_data_that_is_damaged_is_one_error_for_all_ranks(tmp_path: Path, dataset: Path) -> None:
    _cut(dataset.with_suffix(".bin"), 1998)
    own = [*TINY, "--data.no-synthetic", "--data.prefix", str(dataset), "--output", str(tmp_path / "run")]
    with started(tmp_path / "log", [own, own]) as ranks:
        assert ranks.wait() == [2, 2]
        assert ranks.everything().count("text.bin is truncated") == 1
        assert ranks.everything().count("error: ") == 1
    assert not (tmp_path / "run").exists()


# --- the output directory ---------------------------------------------------------------------------------------


@pytest.fixture
def finished(run: Run, tmp_path: Path) -> Path:
    """A run of 4 steps with checkpoints at 2 and 4."""
    output = tmp_path / "finished"
    assert run("--output", str(output), "--checkpoint.save-every", "2").code == 0
    return output


def test_another_runs_directory_is_left_alone(run: Run, finished: Path) -> None:
    before = snapshot(finished)
    done = run("--output", str(finished))
    assert (
        done.code == 2 and "holds another run (its checkpoints)" in done.error and "--checkpoint.resume" in done.error
    )
    assert snapshot(finished) == before
    shutil.rmtree(finished / "checkpoints")
    before = snapshot(finished)
    assert "holds another run (its metrics.jsonl)" in run("--output", str(finished)).error
    assert snapshot(finished) == before


def test_checkpoints_without_a_config_are_not_overwritten(run: Run, finished: Path) -> None:
    for name in ("config.toml", "metrics.jsonl"):
        (finished / name).unlink()
    before = snapshot(finished)
    assert "holds another run (its checkpoints)" in run("--output", str(finished)).error
    assert snapshot(finished) == before


def test_a_run_that_ended_before_its_first_step_does_not_block_the_next(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("seed = 1\n")
    assert run("--output", str(tmp_path / "run")).code == 0
    assert read_losses(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.num-layers", "3"], "is of another model or seed (model.num_layers: 2 -> 3)"),
        (["--seed", "7"], "is of another model or seed (seed: 1234 -> 7)"),
    ],
)
def test_a_run_is_not_continued_as_another(run: Run, finished: Path, arguments: list[str], message: str) -> None:
    before = snapshot(finished)
    done = run("--output", str(finished), "--checkpoint.resume", "--train.steps", "6", *arguments)
    assert done.code == 2 and message in done.error
    assert snapshot(finished) == before


def test_what_a_resumed_run_does_differently_is_said(run: Run, finished: Path) -> None:
    fp8 = ["--precision.fp8", "rowwise", "--precision.fp8-min-features", "0", "--precision.fp8-emulate"]
    done = run("--output", str(finished), "--checkpoint.resume", "--train.steps", "6", "--optimizer.lr", "0.01", *fp8)
    assert done.code == 0 and "precision.fp8: 'none' -> 'rowwise'" in done.out
    assert "resumed from step 4 of 6, with other settings than before: optimizer.lr: 0.0003 -> 0.01" in done.out
    assert "train.steps: 4 -> 6" in done.out and len(read_losses(finished)) == 6


def test_resume_where_there_is_nothing_says_so_and_begins(run: Run, tmp_path: Path) -> None:
    done = run("--output", str(tmp_path / "run"), "--checkpoint.resume")
    assert done.code == 0 and f"no checkpoint in {tmp_path / 'run'}, so this run starts from the beginning" in done.out
    # A run that died before its first checkpoint, in the middle of a line.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert run("--output", str(tmp_path / "run"), "--checkpoint.resume").code == 0
    assert len(read_losses(tmp_path / "run")) == 4


def test_two_jobs_do_not_write_to_one_directory_at_once(
    run: Run, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")  # by srun, without torchrun
    with (finished / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        before = snapshot(finished)
        done = run("--output", str(finished), "--checkpoint.resume", "--train.steps", "6")
        assert done.code == 2 and "another job is writing to" in done.error
        assert "SLURM_STEP_NUM_TASKS=8: that many processes were started, and each trains alone" in done.error
        assert snapshot(finished) == before


@pytest.mark.parametrize("where", ["a file", "below a file", "no directory can be made there"])
def test_a_place_that_cannot_be_written(run: Run, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    place = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run"}.get(where, Path("/proc/run"))
    done = run("--output", str(place))
    assert done.code == 2 and f"output={str(place)!r} cannot be" in done.error
    assert (tmp_path / "file").read_text() == "mine"


# --- checkpoints ------------------------------------------------------------------------------------------------


def _data_byte(path: Path) -> int:
    """A byte in the middle of a safetensors file's data."""
    return (int.from_bytes(path.read_bytes()[:8], "little") + 8 + path.stat().st_size) // 2


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("truncated", lambda c: _cut(c / "step-00000004" / "rank-00000.safetensors", 1000), "has 1000 bytes instead of"),
    ("missing file", lambda c: (c / "step-00000004" / "rank-00000.safetensors").unlink(), "is missing"),
    ("no manifest", lambda c: (c / "step-00000004" / "manifest.json").unlink(), "has no manifest.json"),
    ("flipped manifest", lambda c: _flip(c / "step-00000004" / "manifest.json", 300), "does not match its checksum"),
    ("flipped latest", lambda c: _flip(c / "latest", 3), "latest"),
    ("no latest", lambda c: (c / "latest").unlink(), "has no file `latest`"),
    (
        "flipped bit",
        lambda c: _flip(
            c / "step-00000004" / "rank-00000.safetensors",
            _data_byte(c / "step-00000004" / "rank-00000.safetensors"),
        ),
        "checksum",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_damaged_checkpoint_is_not_resumed_and_the_good_one_is_named(
    run: Run, finished: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(finished / "checkpoints")
    before = snapshot(finished)
    done = run("--output", str(finished), "--checkpoint.resume", "--train.steps", "6")
    assert done.code == 2 and message in done.error, done.error
    good = "step-00000004" if "latest" in message else "step-00000002"
    assert f"{finished / 'checkpoints' / good} looks whole" in done.error
    assert snapshot(finished) == before


def test_weights_of_another_model_are_refused_with_the_settings_that_differ(run: Run, finished: Path) -> None:
    new, source = finished.parent / "new", str(finished / "checkpoints")
    done = run("--output", str(new), "--checkpoint.init-from", source, "--model.num-layers", "3")
    assert done.code == 2 and "another model than the settings describe: model.num_layers: 2 -> 3. " in done.error
    done = run("--output", str(new), "--checkpoint.init-from", source, "--model.norm", "rmsnorm")
    assert done.code == 2 and "model.norm: 'layernorm' -> 'rmsnorm'. What is left out is taken from" in done.error
    # What failed left nothing that would stop the next try.
    assert snapshot(new) == {}
    assert run("--output", str(new), "--checkpoint.init-from", source).code == 0


def test_weights_from_nowhere(run: Run, tmp_path: Path) -> None:
    # The mask token would be right for a BERT, which the checkpoint would say that the model is.
    nowhere = ["--checkpoint.init-from", str(tmp_path / "nowhere"), "--data.mask-token", "7"]
    done = run("--output", str(tmp_path / "run"), *nowhere)
    assert done.code == 2 and f"{tmp_path / 'nowhere'} does not exist" in done.error and "mask" not in done.error
    assert snapshot(tmp_path) == {}


def test_a_flipped_bit_in_one_ranks_file_is_one_error_for_all_ranks(tmp_path: Path) -> None:
    own = [*TINY, "--mesh.tp", "2", "--output", str(tmp_path / "run"), "--checkpoint.resume"]
    with started(tmp_path / "a", [own, own]) as ranks:
        assert ranks.wait() == [0, 0]
    path = tmp_path / "run" / "checkpoints" / "step-00000004" / "rank-00001.safetensors"
    _flip(path, _data_byte(path))
    before = snapshot(tmp_path / "run")
    own += ["--train.steps", "6"]
    with started(tmp_path / "b", [own, own]) as ranks:
        assert ranks.wait() == [2, 2]
        assert ranks.everything().count("error: ") == 1
        assert "rank-00001.safetensors" in ranks.everything() and "checksum" in ranks.everything()
    assert snapshot(tmp_path / "run") == before


# --- no space ---------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_the_checkpoint_and_not_the_run_or_the_one_before(tmp_path: Path) -> None:
    own = [*TINY, "--mesh.tp", "2", "--model.hidden-size", "64", "--output", str(tmp_path / "run")]
    own += ["--train.steps", "6", "--checkpoint.save-every", "2"]
    with started(tmp_path / "a", [own, own], planted_faults.disk_is_full_from_step_3) as ranks:
        # Step 2 is saved, step 4 is not and training goes on, and without step 6 the run cannot end well.
        assert ranks.wait() == [2, 2]
        text = ranks.everything()
        assert text.count("checkpoint of step 4 NOT written, training goes on: ") == 1
        assert text.count("error: ") == 1 and "File too large" in text
    assert len(read_losses(tmp_path / "run")) == 6
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    own += ["--checkpoint.resume"]
    with started(tmp_path / "b", [own, own]) as ranks:
        assert ranks.wait() == [0, 0]
        assert "resumed from step 2 of 6" in ranks.output(0)
    assert len(read_losses(tmp_path / "run")) == 6


def test_a_disk_without_room_is_seen_before_writing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real(path)[:3], 0, 0, *real(path)[5:]]))
    done = run("--output", str(tmp_path / "run"))
    assert done.code == 2 and "a checkpoint of this run needs 17.1 MB, but " in done.error
    assert f"{tmp_path / 'run'} has 0.00 GB free" in done.error and snapshot(tmp_path) == {}
    assert run("--output", str(tmp_path / "run"), "--checkpoint.no-save-at-end").code == 0


def test_room_that_is_taken_while_a_run_trains_costs_a_checkpoint_and_not_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = os.statvfs, []

    def statvfs(path: str) -> os.statvfs_result:
        asked.append(path)
        return real(path) if len(asked) == 1 else os.statvfs_result([*real(path)[:3], 0, 0, *real(path)[5:]])

    monkeypatch.setattr(os, "statvfs", statvfs)
    done = run("--output", str(tmp_path / "run"), "--checkpoint.save-every", "3")
    assert done.code == 2 and "checkpoint of step 3 NOT written, training goes on" in done.out
    assert len(read_losses(tmp_path / "run")) == 4
