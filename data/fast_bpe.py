"""The ids of a byte-level BPE ``tokenizer.json``, from tiktoken's encoder, which is much faster.

tiktoken merges the neighbours whose *joined bytes* have the lowest rank, ``tokenizers`` the *pair* that comes first
in a list. :func:`fast_encoder` gives an encoder only where the two are the same for every text:

* The tokenizer is byte-level BPE without normalizer or prefixes; every byte has a token; the merges make
  tokens of ascending id, so that an id can serve as rank.
* Every token ``t`` that a merge makes is what the merges turn ``t`` itself into. Then both algorithms join the same
  neighbours: suppose both have gone the same way so far and ``x y`` stand side by side with ``xy = t`` a token. No
  merge has crossed the border of ``t`` yet, so what happened inside it is what happens to ``t`` alone, and that ends
  in ``t``: the pair ``x, y`` is in the list, with the rank of ``t``. The converse is plain, and both take the lowest
  rank first and the leftmost of equals.
* The text is cut into words by the same regular expression, which says the same to both regex engines: no anchors,
  which are those of lines to ``tokenizers`` and of the text to tiktoken, and no ``{1,3}+``, which repeats to one and is
  possessive to the other. They may know different versions of Unicode: each character that is not ASCII is tried in
  both, in contexts that show its classes, the first time it occurs, and a text with one that differs goes to
  ``tokenizers``.
* So does a text that contains an added token, or so long a run of white space that tiktoken's regex gives up.

Besides, one text in :data:`SAMPLED` is encoded by both.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt

GPT2_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""How ``ByteLevel(use_regex=True)`` cuts text into words."""
SAMPLED = 500
CONTEXTS = (
    *("a{0}a", "1{0}1", " {0}", "  {0}", "{0}{0}", "'{0}", "'s{0}"),
    *("!{0}!", "\n{0}\n", "{0} {0}", "{0}  ", "a\u0301{0}"),
)
_CLASS = r"\[(?:\\.|[^\[\]\\])*\]"
_REGEX_PARTS = re.compile(rf"(?s)\\[pPx]\{{[^}}]*\}}|\\.|{_CLASS}|\{{[\d,]*\}}\+?|\(\?[\w-]+|.")
_AMBIGUOUS = re.compile(r"[\^$]|\\[bBAzZGRXK]|\{.*\}\+|\(\?.*m.*|\[")
"""Parts of a regular expression that mean, or may mean, something else to the other engine."""
RUN_OF_SPACE = re.compile(r"(?<!\s)\s{50000}")


class Unsuitable(Exception):
    """Why tiktoken cannot stand in for a tokenizer."""


def for_tokenizers(pattern: str) -> str:
    """A regular expression of tiktoken's written for ``tokenizers``' engine.

    Raises:
        Unsuitable: it has a part that may mean another thing there.
    """
    parts: list[str] = []
    for part in _REGEX_PARTS.findall(pattern):
        if part in "^$":
            parts.append(r"\A" if part == "^" else r"\z")
        elif part[0] == "{" and part[-1] == "+" and parts[-1:] != [")"]:
            parts.append(f"(?>{parts.pop()}{part[:-1]})")
        elif _AMBIGUOUS.fullmatch(part):
            raise Unsuitable(f"{part!r} in it may mean another thing to `tokenizers`")
        else:
            parts.append(part)
    return "".join(parts)


def gives_up(error: BaseException) -> bool:
    """Whether tiktoken's regex cannot take a text: an error, or a panic of the Rust side (no ``Exception``)."""
    return isinstance(error, ValueError) or type(error).__name__ == "PanicException"


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table): itself where it is visible
    in Latin-1, else the next of the characters from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


class FastEncoder:
    """Encodes with tiktoken what it may, with ``backend``, a ``tokenizers.Tokenizer``, the rest.

    ``proved``: the conditions on the merges were checked before: do not check again, which takes its time.

    Raises:
        Unsuitable: the conditions above do not hold; says which, or that tiktoken is not installed.
    """

    def __init__(self, backend: Any, proved: bool = False):
        description = json.loads(backend.to_str())
        ranks, words = _ranks(description, proved), _words(description)
        try:
            import tiktoken
        except ImportError:
            raise Unsuitable("tiktoken is not installed (pip install tiktoken)") from None
        try:
            encoding = tiktoken.Encoding("twin", pat_str=words, mergeable_ranks=ranks, special_tokens={})
        except Exception as error:
            raise Unsuitable(f"tiktoken does not take it: {error}") from None
        self._fast = encoding._core_bpe.encode_ordinary
        self._backend = backend
        self._added = [token["content"] for token in description["added_tokens"]]
        self._known: set[str] = {chr(code) for code in range(128)}
        self._distrusted: set[str] = set()
        self._until_check = 1
        if not proved and (differ := [character for character in sorted(self._known) if not self._same(character)]):
            raise Unsuitable(f"the regex that cuts words means something else to tiktoken for {differ[:5]}")

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """The ids of one text."""
        ids = self._twin(text) if self._trusted(text) else None
        if ids is None:
            return np.array(self._slow(text), np.uint32)
        self._until_check -= 1
        if self._until_check <= 0:
            self._until_check = SAMPLED
            if ids != self._slow(text):
                raise RuntimeError(
                    f"tiktoken and tokenizers disagree on a text that starts with {text[:60]!r}; this is a defect of "
                    "megatron_ds.data.fast_bpe, please report it. Load the tokenizer with fast=False meanwhile"
                )
        return np.array(ids, np.uint32)

    def _slow(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _twin(self, text: str) -> list[int] | None:
        """What tiktoken makes of a text; None where it gives up, as on an empty word."""
        try:
            ids: list[int] = self._fast(text)
        except BaseException as error:
            if not gives_up(error):
                raise
            return None
        return ids

    def _trusted(self, text: str) -> bool:
        if not text.isascii():
            for character in set(text) - self._known:
                self._known.add(character)
                if not self._same(character):
                    self._distrusted.add(character)
            if self._distrusted and not self._distrusted.isdisjoint(text):
                return False
        if any(token in text for token in self._added):
            return False
        return len(text) < 50_000 or RUN_OF_SPACE.search(text) is None

    def _same(self, character: str) -> bool:
        probes = (context.format(character) for context in CONTEXTS)
        return all(self._twin(probe) == self._slow(probe) for probe in probes)


def _ranks(description: dict[str, Any], proved: bool) -> dict[bytes, int]:
    """Token bytes -> id, which is also its rank; checks all conditions on the model."""
    from tokenizers import models

    model = description["model"]
    if description["normalizer"] is not None:
        raise Unsuitable(f"it normalises text ({description['normalizer']['type']})")
    if model["type"] != "BPE":
        raise Unsuitable(f"its model is {model['type']}, not BPE")
    for setting in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(setting):
            raise Unsuitable(f"it has {setting}")
    vocabulary: dict[str, int] = model["vocab"]
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    if missing := [byte for character, byte in byte_of.items() if character not in vocabulary]:
        raise Unsuitable(f"{len(missing)} bytes have no token")
    ranks = {bytes([byte]): vocabulary[character] for character, byte in byte_of.items()}
    pairs: list[tuple[str, str]] = [
        (left, right) for left, right in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    ]
    alone = models.BPE(vocabulary, pairs)  # without ignore_merges: what the merges themselves do
    last = -1
    for left, right in pairs:
        token = left + right
        if vocabulary[token] <= last:
            raise Unsuitable(f"its merges do not make tokens of ascending id ({token!r})")
        last = vocabulary[token]
        proper = all(character in byte_of for character in token)
        if not proper or not (proved or [piece.id for piece in alone.tokenize(token)] == [last]):
            raise Unsuitable(f"its token {token!r} is not what its merges make of it")
        ranks[bytes(byte_of[character] for character in token)] = last
    if model.get("ignore_merges") and len(ranks) < sum(all(c in byte_of for c in token) for token in vocabulary):
        raise Unsuitable("it has whole words that no merge makes")
    return ranks


def _words(description: dict[str, Any]) -> str:
    """The regular expression that cuts text into words."""
    steps = description["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps and steps["type"] == "Sequence" else [steps]
    last = steps[-1]
    if not last or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise Unsuitable("its words are not cut into bytes, or get a space in front")
    if len(steps) == 1 and last.get("use_regex", True):
        return GPT2_WORDS
    if len(steps) == 2 and not last.get("use_regex", True):
        split = steps[0]
        regex = split["pattern"].get("Regex") if split["type"] == "Split" else None
        if regex and split["behavior"] == "Isolated" and not split["invert"]:
            if part := next(filter(_AMBIGUOUS.fullmatch, _REGEX_PARTS.findall(regex)), None):
                raise Unsuitable(
                    f"its words are cut by a regex with {part!r}, which may mean another thing to tiktoken"
                )
            return str(regex)
    raise Unsuitable(f"its words are cut by {[step['type'] for step in steps]}")
