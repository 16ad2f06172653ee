"""Every way to name data, through the real entry point: blends, URLs, conversations, fill-in-the-middle, ramps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from started_ranks import TINY, pretrain_gpt, started

from megatron_ds.config import parse
from megatron_ds.data.blend import BlendSchedule
from megatron_ds.data.chat import template_of_dataset
from megatron_ds.data.gpt_dataset import GPTDataset
from megatron_ds.data.gpt_sources import GPTSources
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_writer import IndexedDatasetWriter
from megatron_ds.data.order import key
from megatron_ds.data.parts import PreprocessOptions
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.source_text import SourceOptions
from megatron_ds.data.tokenizer_training import train_tokenizer
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.models.families import task_of
from megatron_ds.train.launch import run_main
from megatron_ds.train.report import read_losses

REAL = [*TINY, "--data.no-synthetic"]
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """A job of one in this process."""
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *REAL, *arguments])
    return run_main(pretrain_gpt().main)


def sources(*arguments: str) -> GPTSources:
    return task_of(parse([*REAL, *arguments])).open_sources()


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def targets_a_step(output: Path) -> list[int]:
    return [line["targets"] for line in metrics(output)]


def positions_a_step(output: Path) -> list[int]:
    """What the rates were computed from."""
    return [round(line["tokens_per_s"] * line["seconds"]) for line in metrics(output)]


def numbers(prefix: Path, documents: int, first: int) -> str:
    """A dataset of documents of 12 tokens ``first`` to ``first + 19``; its prefix."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in range(documents):
            writer.add_document(first + (np.arange(12) + document) % 20)
    return str(prefix)


# --- blends, URLs, ramps ----------------------------------------------------------------------------------------


def test_blend_url_ramp_and_masking_in_one_run_that_resumes_on_other_meshes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps whose batches grow 2, 2, 4, 6, 8, 8: in one run, and as 3 steps on dp=2 and 3 on pp=2."""
    one, other = numbers(tmp_path / "one", 60, 0), numbers(tmp_path / "other", 40, 30)
    own = ["--precision.dtype", "fp64", "--data.document-masking", "--optimizer.schedule", "constant"]
    own += ["--data.blend", "3", one, "1", f"file://{other}", "--data.split", "80,20", "--train.eval-every", "3"]
    own += [
        "--data.cache-dir",
        str(tmp_path / "cache"),
        "--train.global-batch",
        "8",
        "--train.batch-ramp",
        "2",
        "2",
        "12",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(monkeypatch, *own, "--train.steps", "6", "--output", str(whole)) == 0
    own += ["--output", str(parts), "--checkpoint.resume"]
    for steps, mesh in (("3", []), ("6", ["--mesh.pp", "2"])):
        with started(tmp_path / steps, [[*REAL, *own, *mesh, "--train.steps", steps]] * 2) as ranks:
            assert ranks.wait() == [0, 0], ranks.everything()
    assert targets_a_step(parts) == targets_a_step(whole)
    assert len(read_losses(parts)) == 6
    assert read_losses(parts) == pytest.approx(read_losses(whole), rel=0, abs=1e-9)
    assert any((tmp_path / "cache").rglob("other.idx"))  # the copy of the remote one
    # Another size of batch from there on: the samples go on where they were.
    again = ["--train.batch-ramp", "None", "--train.global-batch", "4", "--train.steps", "8"]
    assert run(monkeypatch, *own, *again) == 0

    # What was trained on, from the parts of the blend: the train documents of each, three to one.
    train = sources(*own).train
    sizes = [2, 2, 4, 6, 8, 8, 4, 4]
    places = np.arange(sum(sizes))
    which, within = BlendSchedule([3, 1])(places)
    alone = [
        GPTDataset(IndexedDataset(one), 8, (0, 48), 1234, True),
        GPTDataset(IndexedDataset(other), 8, (0, 32), key(1234, 1), True),
    ]
    batch = train.batch(places)
    counted = []
    for place, (dataset, index) in enumerate(zip(which, within)):
        row = alone[dataset].batch([index])
        for name in row:
            assert (batch[name][place] == row[name][0]).all(), (place, name)
        counted.append(int(row["loss_mask"].sum()))
    expected = [sum(counted[end - size : end]) for end, size in zip(np.cumsum(sizes), sizes)]
    assert targets_a_step(parts) == expected and targets_a_step(whole) == expected[:6]
    # Tokens are all that was computed on every replica: the last of each document, which predicts nothing, too.
    assert sum(expected) < 8 * sum(sizes)
    assert positions_a_step(parts) == [8 * size for size in sizes]
    assert positions_a_step(whole) == [8 * size for size in sizes[:6]]


def test_a_blend_for_each_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = numbers(tmp_path / "one", 20, 0), numbers(tmp_path / "other", 20, 30)
    own = ["--data.train-blend", "1", one, "--data.valid-blend", "2", other, "--train.eval-every", "2"]
    assert run(monkeypatch, *own, "--output", str(tmp_path / "run")) == 0
    assert len((tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()) == 2
    found = sources(*own)
    assert found.valid is not None
    assert found.train.batch(range(50))["tokens"].max() < 30 <= found.valid.rows(range(20))["tokens"].min()
    said = "train.eval_every=2 evaluates nothing: no data is kept apart for it"
    assert said not in capsys.readouterr().out
    alone = ["--data.prefix", one, "--data.split", "1", "--train.eval-every", "2"]
    assert run(monkeypatch, *alone, "--output", str(tmp_path / "alone")) == 0
    assert said in capsys.readouterr().out


# --- conversations ----------------------------------------------------------------------------------------------


def chats(path: Path, count: int = 20) -> tuple[str, int]:
    """(prefix of preprocessed conversations, bytes of their answers)."""
    answers = ["y" * (1 + i % 5) for i in range(count)]
    lines = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}] for answer in answers]
    path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    template = path.with_suffix(".jinja")
    template.write_text(
        "{% for m in messages %}{{ '>' if m.role == 'user' else '<' }}{{ m.content }}{% endfor %}"
        "{{ '<' if add_generation_prompt else '' }}"
    )
    options = PreprocessOptions("bytes", source=SourceOptions(conversations=True), chat_template=str(template))
    preprocess([str(path.with_suffix(".jsonl"))], path, options, 0)
    return str(path), sum(map(len, answers))


def test_conversations_count_their_answers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, answers = chats(tmp_path / "chats")
    own = ["--data.prefix", prefix, "--data.conversations", "--data.split", "1", "--data.tokenizer", "bytes"]
    own += ["--model.vocab-size", "257", "--train.sequence-length", "16", "--output", str(tmp_path / "run")]
    train = sources(*own).train
    epoch = len(train)
    own += ["--train.global-batch", str(epoch), "--train.steps", "2"]  # a step is an epoch
    assert run(monkeypatch, *own) == 0
    assert targets_a_step(tmp_path / "run") == [answers, answers]
    size = f"2 steps of {epoch} samples (dp 1 x micro-batch 1 x {epoch} micro-batches), {16 * epoch} tokens a step"
    assert f"{size}; 2 epochs of {epoch} samples\n" in capsys.readouterr().out
    batch = train.rows(range(epoch))
    assert set(batch["labels"][batch["loss_mask"]].tolist()) == {ord("y")}
    # The template that they were written by goes with the model, unless it has changed since.
    template, special = Path(prefix).with_suffix(".jinja"), load_tokenizer("bytes").special
    kept = tmp_path / "run" / "checkpoints" / "tokenizer" / "chat_template.jinja"
    assert kept.read_text() == template.read_text() and template_of_dataset(prefix, special) is not None
    template.write_text("{{ another }}")
    assert template_of_dataset(prefix, special) is None and template_of_dataset(str(tmp_path), special) is None


# --- fill-in-the-middle -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer with sentinels, and a dataset made with it."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": f"def f{i}(x): return x"}) + "\n" for i in range(80)))
    tokenizer = train_tokenizer([str(folder / "in.jsonl")], folder / "bpe", 290, special_tokens=FIM)
    options = PreprocessOptions(str(tokenizer), append_eod=True)
    preprocess([str(folder / "in.jsonl")], folder / "set", options, 0)
    return {"tokenizer": tokenizer, "prefix": folder / "set"}


def fim_options(code: dict[str, Path], *names: str) -> list[str]:
    own = ["--data.prefix", str(code["prefix"]), "--data.tokenizer", str(code["tokenizer"]), "--data.split", "1"]
    own += ["--model.vocab-size", "290", "--model.max-positions", "64", "--train.sequence-length", "64"]
    return [*own, "--data.fim.rate", "0.8", "--data.fim.spm-rate", "0", "--data.fim.tokens", *(names or FIM)]


def test_fill_in_the_middle(code: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fim_options(code)
    assert run(monkeypatch, *own, "--output", str(tmp_path / "run")) == 0
    tokenizer = load_tokenizer(code["tokenizer"])
    train = sources(*own).train
    documents = []
    for row in train.batch(range(200))["tokens"]:
        documents += tokenizer.decode(row).split("<|endoftext|>")[1:-1]  # the first and the last may be cut
    assert len(documents) > 100
    rearranged = 0
    for text in documents:
        if FIM[0] in text:
            rearranged += 1
            head, suffix = text.removeprefix(FIM[0]).split(FIM[2])
            suffix, middle = suffix.split(FIM[1])
            text = head + middle + suffix
        assert text.startswith("def f") and text.endswith("(x): return x")
    assert abs(rearranged / len(documents) - 0.8) < 0.08


# --- what cannot be read is said before anything starts ---------------------------------------------------------


def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], output: Path, *arguments: str) -> str:
    capfd.readouterr()
    assert run(monkeypatch, "--output", str(output), *arguments) == 2
    assert not output.exists()
    error = capfd.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    return error


def test_what_cannot_be_read(
    code: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: Any) -> str:
        return refused(monkeypatch, capfd, tmp_path / "run", *map(str, arguments))

    one, damaged = numbers(tmp_path / "one", 20, 0), Path(numbers(tmp_path / "damaged", 20, 30))
    with damaged.with_suffix(".bin").open("ab") as file:
        file.truncate(470)
    assert f"{tmp_path}/none.idx does not exist" in error("--data.blend", 1, one, 1, tmp_path / "none")
    assert "damaged.bin is truncated" in error("--data.blend", 1, one, 1, damaged)
    assert "damaged.bin is truncated" in error("--data.train-blend", 1, one, "--data.valid-blend", 1, damaged)
    url = f"file://{tmp_path}/none"
    assert f"{url} is not a dataset: there is no" in error("--data.prefix", url, "--data.cache-dir", tmp_path / "c")
    assert "s3x://a/b cannot be read: Protocol not known: s3x" in error("--data.prefix", "s3x://a/b")
    assert "one.loss_mask does not exist" in error("--data.prefix", one, "--data.conversations", "--data.split", 1)
    assert "is in the blends of both train and valid" in error(
        "--data.train-blend", 1, one, "--data.valid-blend", 1, one
    )
    chat, _ = chats(tmp_path / "chats")
    mixed = ["--data.blend", 1, chat, 1, code["prefix"], "--model.vocab-size", 290]
    assert f"{chat} was made with the tokenizer bytes, but {code['prefix']} with " in error(*mixed)
    wrong = fim_options(code, "<|fim_prefix|>", "<|fim_middle|>", "<SUF>")
    assert "the tokenizer has no token '<SUF>' for fill-in-the-middle; name tokens that it has" in error(*wrong)
