"""How the tokens of a request are chosen, under the names that the field uses (vLLM's ``SamplingParams``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from megatron_ds.errors import ConfigError
from megatron_ds.inference.structured import form_faults

_MOST_SAMPLES, _MOST_LOGPROBS, _MOST_STOPS = 128, 1000, 64
_SUGGESTED = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_NEUTRAL: Mapping[str, float | None] = {
    "no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "stop_strings": None,
    "min_length": 0, "min_new_tokens": 0, "num_beams": 1, "penalty_alpha": None, "guidance_scale": 1, "typical_p": 1,
    "top_h": None, "epsilon_cutoff": 0, "eta_cutoff": 0, "exponential_decay_length_penalty": None,
    "watermarking_config": None,
}  # fmt: skip
"""Settings of ``transformers`` that change which tokens come and are not served here, and where they change nothing."""
_FLAGS = "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"
_COLDEST = 1e-5
"""Logits divided by less would overflow in fp32, and the first of several infinite ones would be taken."""


@dataclass(frozen=True)
class SamplingParams:
    """The order in which they act: ``logit_bias``, penalties, ``min_tokens``, temperature, top-k, top-p, min-p.

    Attributes:
        n: samples of the prompt, each with draws of its own.
        temperature: 0, or less than 1e-5, takes the most probable token (of equals the one with the smallest id).
        top_k: only so many most probable tokens, and those that equal the last of them; -1 or 0: all.
        top_p: only the most probable tokens that together have this probability.
        min_p: only tokens that have this part of the most probable one's probability.
        presence_penalty, frequency_penalty: taken from the logit of a token that the answer has, once and for each
            time. repetition_penalty: logits of tokens of prompt and answer are divided (positive ones) or multiplied.
        seed: of the draws. A draw depends on (seed, sample, position in the text) alone, not on what else is served;
            None: a new one for each request.
        stop: texts at which the answer ends; they are not part of it, unless ``include_stop_str_in_output``.
        stop_token_ids: tokens at which it ends, whose text is part of it likewise.
        ignore_eos: the model's own end does not end it.
        min_tokens: before so many tokens, none that ends the answer, and no stop text that does.
        logprobs: log-probabilities of the chosen and so many most probable tokens, of the model's own distribution.
        processed_logprobs: likewise, of the distribution that was drawn from.
        prompt_logprobs: likewise of the prompt's tokens, by the model.
        logit_bias: added to the logits of these tokens.
        allowed_token_ids: only these may come.
        structured_outputs: the form of the answer, one of ``{"json": schema}``, ``{"json_object": True}``,
            ``{"regex": text}``, ``{"choice": texts}`` and ``{"grammar": text}`` (Lark); JSON comes without blanks.
        skip_special_tokens: whether special tokens are left out of the text.
        detokenize: whether there is to be a text at all.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] | str = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    processed_logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: Mapping[str, Any] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        nothing: Mapping[str, Any] = {"stop": (), "stop_token_ids": (), "logit_bias": {}}
        for name, empty in nothing.items():
            if getattr(self, name) is None:  # as it is by default in vLLM
                object.__setattr__(self, name, empty)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        faults = list(self._faults())
        if faults:
            raise ConfigError("; ".join(faults))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", {int(token): float(b) for token, b in self.logit_bias.items()})

    def _faults(self) -> Any:
        low: float
        high: float
        most = math.inf
        for name, low, high in (
            ("n", 1, _MOST_SAMPLES),
            ("top_k", -1, most),
            ("min_tokens", 0, most),
            ("max_tokens", 1, most),
            ("seed", -(1 << 63), (1 << 63) - 1),
            ("logprobs", 0, _MOST_LOGPROBS),
            ("processed_logprobs", 0, _MOST_LOGPROBS),
            ("prompt_logprobs", 0, _MOST_LOGPROBS),
        ):
            value = getattr(self, name)
            if value is None and name not in ("n", "top_k", "min_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                yield f"{name}={value!r} is no whole number from {low} to {high}"
        for name, low, high in (
            ("temperature", 0.0, most),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.0, most),
        ):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low <= value <= high or (value == 0 and name in ("top_p", "repetition_penalty")):
                first = f"above {low:g} and up" if name in ("top_p", "repetition_penalty") else f"from {low:g}"
                yield f"{name}={value!r} is no number {first} to {high:g}"
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                yield f"{name}={getattr(self, name)!r} is neither true nor false"
        if isinstance(self.max_tokens, int) and isinstance(self.min_tokens, int) and self.min_tokens > self.max_tokens:
            yield f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}"
        if not isinstance(self.stop, list | tuple) or not all(isinstance(s, str) and s for s in self.stop):
            yield f"stop={self.stop!r} is neither a text nor a list of texts, none of them empty"
        elif len(self.stop) > _MOST_STOPS:
            yield f"stop has {len(self.stop)} texts; {_MOST_STOPS} are the most"
        elif self.stop and not self.detokenize:
            yield "stop needs detokenize=True; use stop_token_ids"
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("allowed_token_ids", self.allowed_token_ids or ())):
            if not isinstance(ids, list | tuple) or not all(_is_id(i) for i in ids):
                yield f"{name}={ids!r} is no list of token ids"
        if self.allowed_token_ids is not None and (not self.allowed_token_ids or self.structured_outputs is not None):
            yield "allowed_token_ids is a list of one token or more, and does not go with structured_outputs"
        if self.structured_outputs is not None:
            if fault := form_faults(self.structured_outputs):
                yield fault
            if self.min_tokens or self.ignore_eos:
                yield "structured_outputs says where the answer ends; leave out min_tokens and ignore_eos"
        if not isinstance(self.logit_bias, Mapping):
            yield f"logit_bias={self.logit_bias!r} does not give numbers to token ids"
            return
        for token, bias in self.logit_bias.items():
            if not _is_number_of_token(str(token)) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
                yield f"logit_bias[{token!r}]={bias!r}: give a number from -100 to 100 to a token id"
                return

    @cached_property
    def greedy(self) -> bool:
        return self.temperature < _COLDEST or self.top_k == 1

    @cached_property
    def keeps_logits(self) -> bool:
        """Whether the token is the most probable one of the model's own distribution."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return self.greedy and not self.logit_bias and not penalties

    @cached_property
    def plain(self) -> bool:
        """Whether it is so from the first token on, and nothing is asked of probabilities."""
        asked = (self.logprobs, self.processed_logprobs, self.prompt_logprobs) != (None, None, None)
        return self.keeps_logits and not self.min_tokens and not asked

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def suggested_settings(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's ``generation_config.json`` says of how its tokens are to be drawn, for requests that say nothing.

    Raises:
        ConfigError: something that no request could ask for.
    """
    for name, neutral in _NEUTRAL.items():
        if (value := generation.get(name)) not in (None, [], {}, neutral):
            raise ConfigError(
                f"generation_config.json: {name}={value!r} changes the answers of transformers and is not served here; "
                "remove it, or pass generation_config='none'"
            )
    said = {name: generation[name] for name in _SUGGESTED if generation.get(name) is not None}
    try:
        SamplingParams(**said)
    except ConfigError as error:
        raise ConfigError(f"generation_config.json: {error}; mend it, or pass generation_config='none'") from None
    return said


def _is_number_of_token(text: str) -> bool:
    """In its one form: two that mean the same would hide one another."""
    return text.isascii() and text.isdecimal() and len(text) < 12 and text == str(int(text))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
