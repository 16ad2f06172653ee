"""Answers of a given form: JSON of a schema, a regular expression, one of some texts, a grammar; by llguidance.

Before each token a matcher says which tokens may follow; the sampler leaves the others out. All ranks follow the same
tokens with a matcher each, so that nothing about them is sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ds.data.tokenizers import HFTokenizer
from megatron_ds.errors import ConfigError

KINDS = ("json", "json_object", "regex", "choice", "grammar")
_LONGEST = 65_536


def form_faults(form: Any) -> str | None:
    """What is wrong with ``structured_outputs`` before a tokenizer is known; None: nothing."""
    if not isinstance(form, Mapping) or len(form) != 1 or next(iter(form)) not in KINDS:
        return f"structured_outputs={form!r} does not have exactly one of {', '.join(KINDS)}"
    ((kind, value),) = form.items()
    if kind == "json" and not isinstance(value, dict | str):
        return f"structured_outputs: json={value!r} is no JSON schema, as an object or a text"
    if kind == "json_object" and value is not True:
        return f"structured_outputs: json_object={value!r} is not true"
    if kind in ("regex", "grammar") and not (isinstance(value, str) and value):
        return f"structured_outputs: {kind}={value!r} is no text"
    if kind == "choice" and not (isinstance(value, list | tuple) and value and all(_is_text(v) for v in value)):
        return f"structured_outputs: choice={value!r} is no list of texts"
    if len(json.dumps(value)) > _LONGEST:
        return f"structured_outputs: {kind} has more than {_LONGEST:,} characters"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


class Matcher:
    """What may follow in one answer."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def ended(self) -> str | None:
        """Why nothing may follow: ``stop``, the answer is complete; ``abort``, its form is too much for llguidance."""
        if self._matcher.is_error():
            return "abort"
        return "stop" if self._matcher.is_stopped() else None

    def take(self, token: int) -> None:
        """Follow the answer."""
        self._matcher.consume_token(token)

    def allowed(self, draft: Sequence[int] = ()) -> Tensor:
        """bool ``[v]``: what may come after ``draft``; anything where the draft itself may not come."""
        taken = 0
        for token in draft:
            if self._matcher.is_stopped() or self._matcher.validate_tokens([token]) < 1:
                break
            self._matcher.consume_token(token)
            taken += 1
        if taken < len(draft) or self._matcher.is_stopped():
            found = torch.ones(self._vocab_size, dtype=torch.bool)  # nobody will read it
        else:
            found = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        if taken:
            self._matcher.rollback(taken)
        return found


class AllowedTokens(Matcher):
    """The same ones may follow everywhere."""

    ended = None

    def __init__(self, tokens: Sequence[int], vocab_size: int):
        self._allowed = torch.zeros(vocab_size, dtype=torch.bool)
        self._allowed[list(tokens)] = True

    def take(self, token: int) -> None:
        pass

    def allowed(self, draft: Sequence[int] = ()) -> Tensor:
        return self._allowed


class Structures:
    """Makes the matchers of a model.

    Args:
        tokenizer: a ``tokenizer.json``; of others it is not known which bytes a token stands for.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int], vocab_size: int):
        self._tokenizer, self._ends, self._vocab_size = tokenizer, list(ends), vocab_size
        self._words: Any = None

    def check(self, form: Mapping[str, Any]) -> None:
        """Raises :class:`ConfigError` where no answer can have this form."""
        library, words = self._open()
        is_error, messages = library.LLMatcher.validate_grammar_with_warnings(_grammar(library, form), words)
        if is_error:
            raise ConfigError(f"structured_outputs: {_first_line(messages)}")

    def matcher(self, form: Mapping[str, Any] | None, tokens: Sequence[int] | None = None) -> Matcher | None:
        """For an answer of a form that :meth:`check` has let pass, or of some ``tokens``; None: any may follow."""
        if form is None:
            return None if tokens is None else AllowedTokens(tokens, self._vocab_size)
        library, words = self._open()
        return Matcher(library.LLMatcher(words, _grammar(library, form)), self._vocab_size)

    def _open(self) -> tuple[Any, Any]:
        """llguidance, and its view of the tokenizer, which takes a moment to make."""
        try:
            import llguidance
        except ImportError:
            raise ConfigError("structured_outputs needs llguidance: pip install 'megatron-ds[serve]'") from None
        if self._words is None:
            if not isinstance(self._tokenizer, HFTokenizer):
                raise ConfigError(
                    "structured_outputs needs a tokenizer.json, which says what bytes each token stands for; "
                    f"the tokenizer here is {type(self._tokenizer).__name__}"
                )
            if not self._ends:
                raise ConfigError("structured_outputs needs a token that ends an answer, and the model names none")
            self._words = llguidance.LLTokenizer(
                self._tokenizer.backend.to_str(), n_vocab=self._vocab_size, eos_token=self._ends
            )
        return llguidance, self._words


def _grammar(library: Any, form: Mapping[str, Any]) -> str:
    ((kind, value),) = form.items()
    matcher = library.LLMatcher
    try:
        if kind in ("json", "json_object"):
            # Compact: blanks are allowed nowhere, or a model that likes them would write nothing else.
            schema = {"type": "object"} if kind == "json_object" else value
            return str(matcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False}))
        if kind == "regex":
            return str(matcher.grammar_from_regex(value))
        lark = value if kind == "grammar" else "start: " + " | ".join(json.dumps(text) for text in value)
        return str(matcher.grammar_from_lark(lark))
    except ValueError as error:
        raise ConfigError(f"structured_outputs: {_first_line([str(error)])}") from None


def _first_line(messages: Sequence[str]) -> str:
    return next((line for message in messages for line in message.splitlines() if line.strip()), "no such form")[:500]
