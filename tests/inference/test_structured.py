"""Answers of a given form, from a random model: they have it, in the model's own proportions."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import _llama

from megatron_ds.data.chat import CHATML, ChatTemplate
from megatron_ds.data.tokenizers import ByteTokenizer
from megatron_ds.errors import ConfigError
from megatron_ds.inference import LLM, SamplingParams
from megatron_ds.inference.openai_protocol import BadRequest, read_call
from megatron_ds.inference.texts import Texts

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    _llama(
        max_position_embeddings=512, vocab_size=ByteTokenizer().vocab_size, eos_token_id=ByteTokenizer().eod_id
    ).save_pretrained(path)
    ByteTokenizer().save_hf(path)
    return path


def answers(llm: LLM, form: dict[str, Any], **settings: Any) -> list[Any]:
    params = SamplingParams(**{"n": 6, "seed": 3, "max_tokens": 200, "structured_outputs": form, **settings})
    return llm.generate("Say: ", params, use_tqdm=False)[0].outputs


def test_answers_have_their_form(folder: Path) -> None:
    with LLM(folder, dtype="float32", max_model_len=400) as llm:
        for form in ({"json": SCHEMA}, {"json": json.dumps(SCHEMA)}):
            for output in answers(llm, form, temperature=1.5):
                found = json.loads(output.text)
                assert output.finish_reason == "stop" and found.keys() == SCHEMA["properties"].keys()  # type: ignore
                assert len(found["name"]) <= 8 and 0 <= found["age"] <= 150 and found["kind"] in ("cat", "dog")
                assert 1 <= len(found["tags"]) <= 3 and all(isinstance(tag, bool) for tag in found["tags"])
                assert (
                    json.dumps(found, separators=(",", ":"), ensure_ascii=False) == output.text or "\\" in output.text
                )
        texts = {output.text for output in answers(llm, {"regex": r"[ab]{2,5}-[0-9]{2}"}, n=16)}
        assert len(texts) > 8 and all(re.fullmatch(r"[ab]{2,5}-[0-9]{2}", text) for text in texts)
        chosen = {output.text for output in answers(llm, {"choice": ["yes", "no", 'né"e']}, n=32)}
        assert chosen == {"yes", "no", 'né"e'}
        lark = 'start: num ("," num)*\nnum: /[0-9]/'
        assert all(
            re.fullmatch(r"\d(,\d)*", o.text) for o in answers(llm, {"grammar": lark}) if o.finish_reason == "stop"
        )
        assert all(o.finish_reason == "length" and o.text == "a" for o in answers(llm, {"regex": "ab"}, max_tokens=1))
        assert all(isinstance(json.loads(o.text), dict) for o in answers(llm, {"json_object": True}, n=2)
                   if o.finish_reason == "stop")  # fmt: skip


def test_what_is_allowed_keeps_its_proportions(folder: Path) -> None:
    with LLM(folder, dtype="float32") as llm:
        free = llm.generate("Say: ", SamplingParams(max_tokens=1, logprobs=1000), use_tqdm=False)[0].outputs[0]
        own = {token: free.logprobs[0][token] for token in map(ord, "xyz")}
        total = math.log(sum(math.exp(value) for value in own.values()))
        (bound,) = answers(llm, {"choice": ["x", "y", "z"]}, n=1, processed_logprobs=1000)
        assert bound.processed_logprobs[0] == pytest.approx({t: v - total for t, v in own.items()}, abs=1e-5)


def test_drafts_and_ranks_change_nothing(folder: Path) -> None:
    form = {"regex": "(abc){5,9}-(abc)*"}
    found = []
    for settings in ({}, {"num_speculative_tokens": 4}, {"tensor_parallel_size": 2}):
        with LLM(folder, dtype="float64", **settings) as llm:
            found.append([output.token_ids for output in answers(llm, form, max_tokens=60)])
            if settings == {"num_speculative_tokens": 4}:
                assert llm.engine.counters.drafted_tokens > 10
    assert all(of == found[0] for of in found[1:])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "does not have exactly one of json, json_object, regex"),
        ({"json": {}, "regex": "a"}, "does not have exactly one"),
        ({"xml": "a"}, "does not have exactly one"),
        ({"json": 3}, "json=3 is no JSON schema"),
        ({"json_object": False}, "json_object=False is not true"),
        ({"regex": ""}, "regex='' is no text"),
        ({"choice": ["a", 1]}, "is no list of texts"),
        ({"regex": "a" * 70000}, "more than 65,536 characters"),
    ],
)
def test_forms_that_are_none(form: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(structured_outputs=form)


def test_forms_that_no_answer_can_have(folder: Path) -> None:
    with LLM(folder) as llm:
        for form in ({"json": {"type": "nothing"}}, {"json": "{"}, {"regex": "(("}, {"grammar": "start: other"},
                     {"json": {"type": "string", "minLength": 5, "maxLength": 2}}):  # fmt: skip
            with pytest.raises(ConfigError, match="structured_outputs: "):
                llm.generate("a", SamplingParams(structured_outputs=form), use_tqdm=False)
        assert answers(llm, {"choice": ["a"]})[0].text == "a", "it serves on"
    with pytest.raises(ConfigError, match="leave out min_tokens and ignore_eos"):
        SamplingParams(structured_outputs={"regex": "a"}, ignore_eos=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(folder / f"{name}.away")
    try:
        with LLM(folder) as llm, pytest.raises(ConfigError, match=r"needs a tokenizer\.json"):
            llm.generate([[3, 4]], SamplingParams(structured_outputs={"regex": "a"}), use_tqdm=False)
    finally:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / f"{name}.away").rename(folder / name)


def test_clients_ask_for_forms_as_openai_has_it() -> None:
    def asked(**more: Any) -> Any:
        body = {"messages": [{"role": "user", "content": "a"}], **more}
        return read_call(body, True, "m", Texts("m", ByteTokenizer(), ChatTemplate(CHATML))).params.structured_outputs

    schema = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": SCHEMA}}
    assert asked(response_format=schema) == {"json": SCHEMA}
    assert asked(response_format={"type": "json_object"}) == {"json_object": True}
    assert asked(response_format={"type": "text"}) is asked() is None
    assert asked(structured_outputs={"regex": "a", "json": None}) == {"regex": "a"}  # as clients' own classes write it
    for wrong in ({"type": "xml"}, {"type": "json_schema"}, 3):
        with pytest.raises(BadRequest, match="response_format takes"):
            asked(response_format=wrong)
    with pytest.raises(BadRequest, match="give one"):
        asked(response_format={"type": "json_object"}, structured_outputs={"regex": "a"})
