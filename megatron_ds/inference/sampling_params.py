"""How the tokens of a request are chosen, under the names that the field uses (vLLM's ``SamplingParams``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from megatron_ds.errors import ConfigError
from megatron_ds.inference.checked_settings import CheckedSettings
from megatron_ds.inference.structured import form_faults

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
_COLDEST = 1e-5
"""Logits divided by less would overflow in fp32, and the first of several infinite ones would be taken."""
_HOTTEST = 1e30
"""Far above it fp32 has infinity alone, and a token that must not come would have no number."""


def _or(empty: Any) -> BeforeValidator:
    """What None means, as it is by default in vLLM."""
    return BeforeValidator(lambda value: empty if value is None else value)


def _texts(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


def _biases(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return {} if value is None else value
    for token in map(str, value):  # in its one form: two that mean the same would hide one another
        if not (token.isascii() and token.isdecimal() and len(token) < 12 and token == str(int(token))):
            raise ValueError(f"{token[:20]!r} is no token id")
    return {int(token): bias for token, bias in value.items()}


_Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
_Logprobs = Annotated[int, Field(ge=0, le=1000)] | None
_Ids = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
_Stops = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, max_length=64)]
_Biases = dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]]


@dataclass(frozen=True)
class SamplingParams(CheckedSettings):
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

    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0.0, le=_HOTTEST)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=1 / _HOTTEST, le=_HOTTEST)] = 1.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop: Annotated[_Stops, BeforeValidator(_texts)] = ()
    stop_token_ids: Annotated[_Ids, _or(())] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: _Logprobs = None
    processed_logprobs: _Logprobs = None
    prompt_logprobs: _Logprobs = None
    logit_bias: Annotated[_Biases, BeforeValidator(_biases)] = Field(default_factory=dict)
    allowed_token_ids: Annotated[_Ids, Field(min_length=1)] | None = None
    structured_outputs: Any = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        if self.stop and not self.detokenize:
            raise ConfigError("stop needs detokenize=True; use stop_token_ids")
        if self.structured_outputs is not None:
            if fault := form_faults(self.structured_outputs):
                raise ConfigError(fault)
            if self.allowed_token_ids is not None:
                raise ConfigError("structured_outputs and allowed_token_ids both say which tokens may come; give one")
            if self.min_tokens or self.ignore_eos:
                raise ConfigError("structured_outputs says where the answer ends; leave out min_tokens and ignore_eos")

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
