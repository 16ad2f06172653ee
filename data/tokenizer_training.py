"""Training a tokenizer on a corpus: byte-level BPE or WordPiece (``tokenizers``), or unigram (SentencePiece)."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_ds.data.source_text import describe_problems
from megatron_ds.data.sources import iterate_texts
from megatron_ds.data.tokenizer_base import write_hf
from megatron_ds.errors import DataError, RaisedAs

Kind = Literal["bpe", "unigram", "wordpiece"]
EOD = "<|endoftext|>"
PIECE_BYTES = 4096
"""SentencePiece trains on sentences and drops longer ones; documents are cut at line ends near this size, or in lines
that are longer."""
MAX_RUN = 256
"""Training takes time in the square of a word's length: longer runs without a break are cut for it."""
LONG_RUN = re.compile("|".join(rf"(?<!{kind}){kind}{{{MAX_RUN + 1},}}" for kind in (r"\w", r"\s", r"[^\w\s]")))


def train_tokenizer(
    inputs: list[str],
    output: str | Path,
    vocab_size: int = 8192,
    kind: Kind = "bpe",
    key: str = "text",
    max_megabytes: float | None = None,
    special_tokens: Sequence[str] = (),
    show_progress: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> Path:
    """Train on the texts of ``inputs`` and write a folder that :func:`load_tokenizer` and ``transformers`` load.

    Args:
        inputs: files or folders as for preprocessing.
        output: the folder.
        vocab_size: of the result, special tokens included.
        kind: ``bpe`` is byte-level (every text can be encoded and comes back exactly); ``unigram`` is
            SentencePiece's, with bytes as fallback; ``wordpiece`` is BERT's, lower-cased.
        key: of the text in a record.
        max_megabytes: read at most this much text (10^6 bytes); a sample is enough for a vocabulary.
        special_tokens: names of further special tokens, e.g. sentinels of fill-in-the-middle.
        show_progress: bars on stderr.
        warn: called with what the user should know about the inputs.

    Raises:
        DataError: no text, a special token twice, or a vocabulary too small for the kind.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    least = {"bpe": 257, "unigram": 300, "wordpiece": 100}[kind]
    if vocab_size < least:
        raise DataError(f"vocab_size={vocab_size} is too small for {kind}: it needs at least {least} for its alphabet")
    if len(set(special_tokens)) < len(special_tokens) or EOD in special_tokens:
        raise DataError(f"special_tokens={list(special_tokens)} must differ from each other and from {EOD}")
    cutter = _RunCutter()
    problems: dict[str, int] = {}
    texts = cutter(_limited(iterate_texts(inputs, key, problems), max_megabytes, show_progress))
    with _written_whole(folder) as partial:
        if kind == "unigram":
            _train_unigram(texts, partial, vocab_size, special_tokens)
        else:
            _train_hf(texts, partial, vocab_size, kind, special_tokens, show_progress)
    if problems:
        warn(f"left out of training: {describe_problems(problems)}")
    if cutter.runs:
        warn(
            f"{cutter.runs:,} runs of more than {MAX_RUN} characters without a break (the longest {cutter.longest:,}) "
            f"were cut into pieces of {MAX_RUN} for training: it takes time in the square of their length"
        )
    return folder


@contextlib.contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files go to ``folder``, which exists, once all of them are complete."""
    partial = Path(f"{folder.absolute()}.incomplete")
    if partial.is_dir():  # of a process that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        # What a tokenizer is found by comes last.
        for path in sorted(partial.iterdir(), key=lambda path: path.stem == "tokenizer"):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial)


class _RunCutter:
    """Cuts texts inside long runs of letters, of white space or of other signs; counts these runs."""

    def __init__(self) -> None:
        self.runs = self.longest = 0

    def __call__(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            at = 0
            for run in LONG_RUN.finditer(text):
                self.runs += 1
                self.longest = max(self.longest, run.end() - run.start())
                for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                    yield text[at:cut]
                    at = cut
            yield text[at:]


def _train_hf(
    texts: Iterator[str], folder: Path, vocab_size: int, kind: Kind, extra: Sequence[str], show_progress: bool
) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        # The alphabet is sorted so that the ids do not depend on a hash's order.
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOD, *extra],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=show_progress,
        )
        config = {"eos_token": EOD}
    else:
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *extra]
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=show_progress)
        config = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special))
    backend.train_from_iterator(texts, trainer)
    unlearnt = 257 if kind == "bpe" else 5  # entries that a vocabulary has in any case
    if backend.get_vocab_size() <= unlearnt + len(extra):
        raise DataError("the inputs hold too little text to train a tokenizer on")
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_hf(folder, {**fixed, **config}, backend)


def _train_unigram(texts: Iterator[str], folder: Path, vocab_size: int, extra: Sequence[str]) -> None:
    import sentencepiece

    from megatron_ds.data.tokenizers import SentencePieceTokenizer

    failed = f"SentencePiece could not train {vocab_size} pieces on these inputs"
    with RaisedAs(DataError, failed, RuntimeError, OSError):
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_pieces(texts),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            character_coverage=0.9999,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            control_symbols=list(extra),
            max_sentence_length=4 * PIECE_BYTES,
            input_sentence_size=1_000_000,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    SentencePieceTokenizer(folder / "tokenizer.model").save_hf(folder)


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        at = 0
        while at < len(text):
            stop = at + PIECE_BYTES
            if stop < len(text):
                stop = text.rfind("\n", at, stop) + 1 or stop
            yield text[at:stop]
            at = stop


def _limited(texts: Iterator[str], max_megabytes: float | None, show_progress: bool) -> Iterator[str]:
    from tqdm import tqdm

    left = float("inf") if max_megabytes is None else max_megabytes * 1e6
    with tqdm(unit="B", unit_scale=True, desc="read", disable=not show_progress) as bar:
        for text in texts:
            if left <= 0:
                return
            size = len(text.encode("utf-8", "replace"))
            left -= size
            yield text
            bar.update(size)
