"""Files that somebody made, to every reader: right or refused, in bounded time and memory; nothing of theirs is run,
and nothing outside their folder is read or written."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hf_folder
import pytest
import torch
from checkpoints import loaded, save
from corpora import CHATS, CONVERSATIONS, TEXTS, opened, read
from damage import files_of, refused
from evil import EVIL, HUGE, RawJson, altered, instead
from started_ranks import TINY
from torch import nn

from megatron_ds.checkpoint import Checkpoint, resolve
from megatron_ds.config import RunConfig, load_toml, parse
from megatron_ds.convert.hugging_face import export_hf, import_hf
from megatron_ds.data.chat import load_template
from megatron_ds.data.chat_records import BadConversation
from megatron_ds.data.preprocess import preprocess
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.deepspeed_json import from_deepspeed
from megatron_ds.engine import read_config
from megatron_ds.engine.without_memory import Filler
from megatron_ds.files import checksum
from megatron_ds.pipeline.timeline import Timeline
from megatron_ds.train.report import read_losses

SECRET = "the secret of another folder"


class Watch:
    """Opens of files, as the interpreter tells of them."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(arguments[0], str | bytes | Path):
            self.opened.append(str(arguments[0]))
        elif self.on and event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
            self.opened.append(f"{event} {arguments}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.opened.clear()
        self.on = True
        try:
            yield
        finally:
            self.on = False


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


# --- what there is to read: a folder, the file in it that is bad, its JSON where it is JSON, and the reader ------


def _manifest(folder: Path, text: str) -> None:
    """With a checksum that is right."""
    body = text[1:]
    encoded = body.encode(errors="surrogatepass")
    (folder / "manifest.json").write_bytes(f'{{"checksum":"{checksum(encoded)}",\n'.encode() + encoded)


def use_checkpoint(folder: Path) -> None:
    loaded(folder / "step-00000001")


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for ids in tokenizer.encode_batch(TEXTS[:3]):
        tokenizer.decode(ids)


def use_template(folder: Path) -> None:
    template = load_template(None, str(folder))
    with contextlib.suppress(BadConversation):  # a record that is left out
        template.renderings(CHATS[0])


def use_corpus(folder: Path) -> None:
    (path,) = [path for path in folder.iterdir() if path.name.startswith("corpus")]
    preprocess([str(path)], folder / "out", CONVERSATIONS, workers=0)


def use_output(folder: Path) -> None:
    read_losses(folder)


def use_engine_config(folder: Path) -> None:
    read_config(str(folder / "ds.json"))


def use_export(folder: Path) -> None:
    shutil.rmtree(folder / "again", ignore_errors=True)
    export_hf(folder / "imported", folder / "again")


DEEPSPEED = {
    "train_batch_size": 16,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 500000000},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.95], "eps": 1e-8}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.001, "warmup_num_steps": 10}},
    "bf16": {"enabled": True},
}
TIMELINE = [{"rank": 0, "action": f"{m}F0", "start": float(m), "end": m + 1.0} for m in range(3)]
TEMPLATE = {
    "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "eos_token": ".",
}
TEMPLATES = (
    *("{% for i in range(10**9) %}x{% endfor %}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% x"),
    *("{{ 'a' * 10**10 }}", "{% include '/etc/passwd' %}", "{{ cycler.__init__.__globals__.os.system('touch evil') }}"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 1/0 }}", "{{ raise_exception('no') }}", "{{ nothing.x }}"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, made: Path, tokenizers: Path) -> Path:
    """A folder for each reader."""
    folder = tmp_path_factory.mktemp("base")
    save(folder / "checkpoint", 1)
    shutil.copytree(made / "text", folder / "dataset")
    shutil.copytree(made / "chat", folder / "conversations")
    hf_folder.write(folder / "hf")
    shutil.copytree(tokenizers / "bpe", folder / "hf", dirs_exist_ok=True)
    shutil.copytree(tokenizers / "bpe", folder / "tokenizer")
    import_hf(folder / "hf", folder / "export" / "imported")
    (folder / "template").mkdir()
    (folder / "template" / "tokenizer_config.json").write_text(json.dumps(TEMPLATE))
    (folder / "engine").mkdir()
    (folder / "engine" / "ds.json").write_text(json.dumps(DEEPSPEED))
    (folder / "timeline").mkdir()
    (folder / "timeline" / "rank.json").write_text(json.dumps(TIMELINE))
    (folder / "corpus").mkdir()
    (folder / "corpus" / "corpus.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in CHATS[:4]))
    (folder / "output").mkdir()
    lines = [json.dumps({"step": i + 1, "loss": 4.0 - i}) + "\n" for i in range(4)]
    (folder / "output" / "metrics.jsonl").write_text("".join(lines))
    return folder


READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": use_checkpoint,
    "dataset": lambda folder: read(opened(folder / "text", "text")),
    "conversations": lambda folder: read(opened(folder / "chat", "chat")),
    "hf": lambda folder: import_hf(folder, folder.parent / "out"),
    "tokenizer": use_tokenizer,
    "template": use_template,
    "engine": use_engine_config,
    "timeline": lambda folder: Timeline.from_json_files(files_of(folder) or [folder / "rank.json"]).schedule(),
    "corpus": use_corpus,
    "output": use_output,
    "export": use_export,
}


def _alter(draw: random.Random, path: Path) -> None:
    """One value of a text of JSON, a TOML value, or a field of a binary header."""
    if path.name == "manifest.json" and path.parent.name.startswith("step-"):
        first, _, body = path.read_text().partition("\n")
        assert first.startswith("{")
        _manifest(path.parent, altered(draw, json.loads("{" + body)))
    elif path.suffix == ".json":
        path.write_text(altered(draw, json.loads(path.read_text())), errors="surrogatepass")
    elif path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = altered(draw, json.loads(lines[at]))
        path.write_text("\n".join(lines) + "\n", errors="surrogatepass")
    elif path.suffix == ".safetensors":
        raw = path.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        text = altered(draw, json.loads(raw[8 : 8 + size])).encode(errors="surrogatepass")
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    elif path.suffix == ".idx":
        raw = bytearray(path.read_bytes())
        field = draw.choice((17, 18, 26, *range(34, len(raw) - 8, 4)))  # dtype, sequences, documents; lengths, places
        value = draw.choice((HUGE, -HUGE, -1, 0, (1 << 63) - 1, 1 << 31, 7))
        raw[field : field + 8] = struct.pack("<q", value)
        print(f"byte {field} of the index: {value}")
        path.write_bytes(bytes(raw))
    else:
        instead(draw, path)


@pytest.mark.trials(1, 40)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_of_files_that_somebody_made(
    draw: random.Random, base: Path, place: Path, reader: str, watch: Watch
) -> None:
    folder = place / "given"
    shutil.copytree(base / reader, folder)
    (place / "secret").mkdir()
    (place / "secret" / "secret.json").write_text(json.dumps({"secret": SECRET}))
    files = [path for path in files_of(folder) if path.name not in ("README.md", "model.toml")]
    text = [path for path in files if path.suffix in (".json", ".jsonl", ".safetensors", ".idx")]
    path = draw.choice(text)
    if reader == "template" and draw.random() < 0.6:
        value = draw.choice(TEMPLATES)
        print(value)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    else:
        (instead if draw.random() < 0.35 else _alter)(draw, path)
    with watch.watching():
        refused(lambda: READERS[reader](folder))
    assert not (folder / "evil").exists() and not Path("evil").exists(), "code of a file was run"
    outside = [
        name
        for name in watch.opened
        if "secret" in name or "passwd" in name or (" " in name and not name.startswith(sys.prefix))
    ]
    assert not outside, f"it reached for {outside}"
    small = [p for p in files_of(place) if p.parent.name != "secret" and p.stat().st_size < 1 << 20]
    assert SECRET not in "".join(p.read_text(errors="replace") for p in small)


@pytest.mark.trials(4, 60)
def test_settings_in_a_file(draw: random.Random, place: Path) -> None:
    """A run's TOML with values that mean nothing, or too much."""
    config = parse([*TINY], config_class=RunConfig).to_dict()
    section = draw.choice([name for name, value in config.items() if isinstance(value, dict)])
    name = draw.choice(sorted(config[section]))
    value = draw.choice(EVIL)
    text = str(value) if isinstance(value, RawJson) else json.dumps(value)
    text = draw.choice((text, text, "1979-05-27", "nan", "-inf", "0x" + "f" * 30, "{a = 1}", '"""', "'''x'''"))
    path = place / "run.toml"
    path.write_text(
        f"[model]\nnum_layers = 2\n[{section}x]\n" if draw.random() < 0.1 else f"[{section}]\n{name} = {text}\n"
    )
    print(path.read_text()[:300])
    refused(lambda: load_toml(path), str(path))


@pytest.mark.trials(2, 20)
def test_weights_of_pickles(draw: random.Random, place: Path) -> None:
    """``pytorch_model.bin``, and what stands in the place of other weights."""
    hf_folder.write(place / "hf", 1)
    (place / "hf" / "model.safetensors").unlink()
    path = place / "hf" / "pytorch_model.bin"
    if draw.random() < 0.3:
        torch.save(
            draw.choice(({"a": 1}, [torch.ones(2)], {"a": torch.ones(2).to_sparse()}, {1: torch.ones(2)}, {})), path
        )
    else:
        instead(draw, path)
    assert refused(lambda: import_hf(place / "hf", place / "out"), str(place / "hf"))
    assert not (place / "hf" / "evil").exists()
    shutil.copyfile(path, place / "model.safetensors") if path.is_file() and path.stat().st_size < 1 << 20 else None
    if (place / "model.safetensors").exists():
        assert refused(lambda: Filler(nn.Linear(1, 1), 0, place), str(place))
        with pytest.raises(Exception, match="checkpoint"):
            Checkpoint(place)
    assert refused(lambda: resolve(place / "hf")) and refused(lambda: from_deepspeed(path))
