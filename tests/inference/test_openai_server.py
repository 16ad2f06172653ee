"""The server as its clients see it: the official client, a load with clients that leave, and requests meant to harm."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from hf_models import _llama
from served import folder_logits

from megatron_ds.data.chat import ChatTemplate
from megatron_ds.data.tokenizers import ByteTokenizer
from megatron_ds.inference import LLM, SamplingParams, openai_server
from megatron_ds.inference.detokenizer import Detokenizer
from megatron_ds.inference.openai_answers import Answers
from megatron_ds.inference.openai_protocol import Call
from megatron_ds.inference.openai_server import Server
from megatron_ds.inference.outputs import CompletionOutput, RequestOutput
from megatron_ds.inference.serving_options import ServerOptions
from megatron_ds.inference.texts import Texts

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if tools %}T{{ tools|length }}{% endif %}>"
)
KEY = "secret"


class Running:
    """A server on a port of its own, in a thread."""

    def __init__(self, folder: Path, **limits: Any):
        self.llm = LLM(folder, num_blocks=40, block_size=8, max_model_len=120, max_num_seqs=8)
        self.server = Server(self.llm, ServerOptions(api_key=KEY, served_model_name="tiny", **limits))
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self._uvicorn = uvicorn.Server(uvicorn.Config(self.server.app, log_level="error", timeout_graceful_shutdown=5))
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [listening]})
        self._thread.start()
        while not self._uvicorn.started:
            time.sleep(0.01)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0, timeout=60)

    def post(self, path: str, data: bytes, key: str = KEY) -> tuple[int, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        request.add_header("authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def idle(self) -> bool:
        """Within some seconds: nobody waits or runs, and every block is free."""
        deadline = time.monotonic() + 60
        pool, batcher = self.llm.engine.batcher.pool, self.llm.engine.batcher
        while time.monotonic() < deadline:
            if not (batcher.running or batcher.waiting or self.llm.engine.has_work or self.server.engine.under_way):
                return pool.free == pool.count
            time.sleep(0.02)
        return False

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(timeout=60)
        self.llm.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose vocabulary is bytes."""
    path = tmp_path_factory.mktemp("model")
    model = _llama(vocab_size=257, max_position_embeddings=256, bos_token_id=None, eos_token_id=256)
    model.save_pretrained(path)
    ByteTokenizer().save_hf(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    server = Running(folder, max_requests=64, max_body_mb=0.2)
    yield server
    server.close()


def test_the_official_client_gets_what_the_engine_says(running: Running, folder: Path) -> None:
    client = running.client
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    with LLM(folder, block_size=8) as llm:
        params = SamplingParams(temperature=0.8, seed=5, max_tokens=12, logprobs=2, n=2)
        want = llm.generate("hello", params, use_tqdm=False)[0]
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": "hello",
        "temperature": 0.8,
        "seed": 5,
        "max_tokens": 12,
        "n": 2,
    }
    whole = client.completions.create(**asked, logprobs=2)
    assert [choice.text for choice in whole.choices] == [sample.text for sample in want.outputs]
    assert whole.usage is not None and whole.usage.completion_tokens == sum(len(s.token_ids) for s in want.outputs)
    shown = whole.choices[0].logprobs
    assert shown is not None and shown.token_logprobs is not None
    assert shown.token_logprobs == [of[t] for t, of in zip(want.outputs[0].token_ids, want.outputs[0].logprobs or [])]
    (both,) = client.completions.create(
        model="tiny", prompt="hello", temperature=0.5, seed=1, max_tokens=3, logprobs=0,
        logit_bias={"97": 50, "98": 50},
        extra_body={"top_k": 2, "processed_logprobs": 5, "prompt_logprobs": 1},
    ).choices  # fmt: skip
    assert both.logprobs is not None and both.logprobs.token_logprobs[0] < -0.1
    for of_token in both.processed_logprobs["top_logprobs"]:
        assert of_token.keys() == {"a", "b"} and sum(map(math.exp, of_token.values())) == pytest.approx(1)
    of_prompt = both.prompt_logprobs
    assert of_prompt[0] is None and of_prompt[1][str(ord("e"))]["decoded_token"] == "e" and len(of_prompt) == 5
    texts = ["", ""]
    usage = None
    for piece in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert (
            usage is None and "usage" in piece.model_fields_set
        )  # null but in the last one, as OpenAI's reference has it
        usage = piece.usage
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [sample.text for sample in want.outputs]
    assert usage is not None and usage.total_tokens == whole.usage.total_tokens


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_are_shown_by_their_ids_where_that_is_asked_for(running: Running, chat: bool) -> None:
    """A text does not tell its tokens: the ids are those of the text, of a stream's pieces together, and of usage."""
    create: Any = running.client.chat.completions.create if chat else running.client.completions.create
    prompt: Any = {"messages": [{"role": "user", "content": "hé"}]} if chat else {"prompt": "<user>hé>"}
    ids = {"return_token_ids": True, "return_tokens_as_token_ids": True, "prompt_logprobs": 0, "request_id": "mine"}
    asked = {"model": "tiny", **prompt, "seed": 2, "max_tokens": 9, "logprobs": True if chat else 1, "extra_body": ids}
    whole = create(**asked)
    place, choice = whole if chat else whole.choices[0], whole.choices[0]
    assert whole.id == ("chatcmpl-mine" if chat else "cmpl-mine")
    assert bytes(place.prompt_token_ids) == "<user>hé>".encode() and len(place.prompt_logprobs) == 10
    assert bytes(choice.token_ids).decode("utf-8", "replace") == (choice.message.content if chat else choice.text)
    shown = [entry.token for entry in choice.logprobs.content] if chat else choice.logprobs.tokens
    assert shown == [f"token_id:{token}" for token in choice.token_ids]
    options = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, _ = create(**asked, stream=True, stream_options=options)
    assert (pieces[0] if chat else pieces[0].choices[0]).prompt_token_ids == place.prompt_token_ids
    seen = 0
    for piece in pieces:
        of_piece = piece.choices[0].token_ids
        assert of_piece == choice.token_ids[seen : seen + len(of_piece)]
        seen += len(of_piece)
        assert piece.usage.completion_tokens == seen and piece.usage.prompt_tokens == 10
    assert seen == len(choice.token_ids)


def test_tokens_are_text_and_text_is_tokens(running: Running) -> None:
    tokens = running.post("/tokenize", '{"prompt": "hé<|endoftext|>"}'.encode())[1]["tokens"]
    assert tokens == [*"hé".encode(), 256]
    assert running.post("/detokenize", json.dumps({"tokens": tokens[:3]}).encode())[1] == {"prompt": "hé"}
    for wrong in ([257], [-1], [True], "a", None):
        assert running.post("/detokenize", json.dumps({"tokens": wrong}).encode())[0] == 400


def test_what_clients_act_on_has_the_word_that_they_look_for(running: Running) -> None:
    """Agents shorten a conversation on `context_length_exceeded`; proxies look for "maximum context length"."""
    client, user = running.client, [{"role": "user", "content": "a" * 500}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 120 tokens") as caught:
        client.chat.completions.create(model="tiny", messages=user)  # type: ignore[arg-type]
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("other/one")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="wrong").models.list()
    assert refused.value.code == "invalid_api_key"


def test_only_allowed_tokens_come_in_their_own_proportions(running: Running, folder: Path) -> None:
    allowed = [*b"xyz"]
    said = running.client.completions.create(
        model="tiny",
        prompt="a",
        max_tokens=1,
        n=8,
        seed=3,
        extra_body={"allowed_token_ids": allowed, "processed_logprobs": 3},
    )
    logits = folder_logits(folder, torch.tensor([[97]]))[0, -1, allowed].log_softmax(-1)
    for choice in said.choices:
        (shown,) = choice.processed_logprobs["top_logprobs"]  # type: ignore[attr-defined]
        assert choice.text in "xyz" and [shown[word] for word in "xyz"] == pytest.approx(logits.tolist(), abs=1e-5)


@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_has_its_log_probabilities(running: Running, folder: Path, stream: bool, most: int) -> None:
    """What evaluation harnesses sum up, of the prompt alone or with an answer; here against the whole text at once."""
    ids, text = [*"hé <".encode()], "hé <"
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": most, "temperature": 0, "echo": True, "logprobs": 2, "n": 2}
    asked |= {"stream_options": {"include_usage": True}} if stream else {}
    for prompt in (text, ids):
        seen: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        said, usage = "", None
        more = {"prompt_logprobs": 4}  # beside those with the text, which are as many as asked for with it
        found = running.client.completions.create(**asked, prompt=prompt, stream=stream, extra_body=more)
        for piece in found if stream else [found]:
            usage = piece.usage or usage
            for choice in piece.choices:
                if choice.index == 1:
                    said += choice.text
                    for name, values in seen.items():
                        values += getattr(choice.logprobs, name)
        assert said.startswith(text) and (said == text) == (not most) and len(seen["tokens"]) == len(ids) + most
        assert usage is not None and usage.completion_tokens == 2 * most and choice.finish_reason == "length"
        assert [*seen["tokens"][0], seen["tokens"][4]] == ["h", "<"]
        assert seen["text_offset"][:6] == [0, 1, 1, 2, 3, 4][: 5 + most]
        assert seen["token_logprobs"][0] is None and seen["top_logprobs"][0] is None
        want = folder_logits(folder, torch.tensor([ids])).log_softmax(-1)[0]
        assert seen["token_logprobs"][1:5] == pytest.approx(
            [float(want[i, t]) for i, t in enumerate(ids[1:])], abs=1e-5
        )
        assert seen["token_logprobs"][5:6] == pytest.approx([float(want[-1].max())][:most], abs=1e-5)
        for place in (3, 4):
            best = [*want[place - 1].topk(2).indices.tolist(), ids[place]]
            words = [bytes([token]).decode("utf-8", "replace") for token in best]
            values = {
                word: pytest.approx(float(want[place - 1, t]), abs=1e-5) for t, word in zip(best[::-1], words[::-1])
            }
            assert seen["top_logprobs"][place] == values


@pytest.mark.parametrize("cuts", [[], [1], [2, 3], [1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("before", [b"", b"x", b"\xf0\x9f"])
def test_offsets_are_places_in_the_text(cuts: list[int], before: bytes) -> None:
    """Of tokens of a byte each, sent in parts: a stray byte and half a character are characters of the text too, and
    what ends a character of the prompt is the answer's."""
    data = b"\x99\x82" * (before > b"x") + b"a\xc3\xa9\x80\xc3b\xf0\x9f"
    detokenizer = Detokenizer(ByteTokenizer(), list(before))
    for token in data:
        detokenizer.add(token)
    detokenizer.finish()
    call = Call(False, "tiny", (tuple(before),), SamplingParams(logprobs=0))
    answers = Answers(call, Texts("tiny", ByteTokenizer()))
    offsets: list[int] = []
    sent = answers._unsent(0)
    for stop in [*cuts, len(data)]:
        part = CompletionOutput(0, detokenizer.text, [*data[:stop]], [{token: 0.0} for token in data[:stop]])
        offsets += answers._choice(0, RequestOutput("r", "", [], [part]), part, sent)["logprobs"]["text_offset"]
    want = "aé\ufffd\ufffdb\ufffd", [0, 1, 1, 2, 3, 4, 5, 5]
    if before > b"x":
        want = "🙂" + want[0], [0, 0, *(place + 1 for place in want[1])]
    assert (detokenizer.text, offsets) == want


def test_what_begins_a_text_has_its_first_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of the text begin at these offsets; one below 0 would be a place near the end."""
    call = Call(False, "tiny", ((256, 98),), SamplingParams(logprobs=0), echoed=("b",))
    sample = CompletionOutput(0, "cd", [99, 100], [{99: -1.0}, {100: -2.0}], finish_reason="length")
    output = RequestOutput("r", None, [256, 98], [sample], [None, {98: -3.0}], True)
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(tokenizer, "token_bytes", lambda token: b"<s>" if token == 256 else bytes([token]))
    (choice,) = Answers(call, Texts("tiny", tokenizer)).whole([output])["choices"]
    assert choice["logprobs"]["tokens"] == ["<s>", *choice["text"]] == ["<s>", *"bcd"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]


def test_a_request_that_says_nothing_takes_the_models_settings(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.llm, "suggested", {"top_k": 1})
    greedy, own, drawn = (
        running.client.completions.create(model="tiny", prompt="hé", max_tokens=12, seed=5, **said).choices[0].text
        for said in ({"temperature": 0}, {}, {"extra_body": {"top_k": 0}})
    )
    assert own == greedy != drawn


def test_a_developer_is_the_system_where_the_template_does_not_know_one(running: Running) -> None:
    said = running.llm.texts.render_chat([{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}])
    assert said == [*b"<system>x<user>y>"]
    knows = ChatTemplate("{% for m in messages if m.role == 'developer' %}{{ m.content }}{% endfor %}")
    assert knows.render([{"role": "developer", "content": "x"}]) == "x"


def test_tokens_that_are_parts_of_characters_come_with_their_bytes(running: Running) -> None:
    bias = {str(byte): 100 for byte in "é".encode()}
    answer = running.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], logit_bias=bias, max_tokens=4, logprobs=True, seed=1
    ).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    assert {tuple(token.bytes or ()) for token in answer.logprobs.content} <= {(0xC3,), (0xA9,)}


def test_conversations_go_through_the_template(running: Running, folder: Path) -> None:
    client = running.client
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 8}
    with LLM(folder, block_size=8) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=8)
        plain, shown = llm.generate(["<user>hi>", "<user>hiT1>"], greedy, use_tqdm=False)
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.content == plain.outputs[0].text
    assert answer.choices[0].logprobs is not None and len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    assert client.chat.completions.create(**asked, tools=tools).choices[0].message.content == shown.outputs[0].text
    pets: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": {"enum": ["cat", "dog"]}}}
    pet = client.chat.completions.create(**asked, response_format=pets).choices[0]
    assert pet.message.content in ('"cat"', '"dog"') and pet.finish_reason == "stop"
    age = {"enum": [{"a": 3}, {"a": 4}]}
    tools.append({"type": "function", "function": {"name": "g", "parameters": age}})
    forced: Any = {"type": "function", "function": {"name": "g"}}
    called = client.chat.completions.create(**asked, tools=tools, tool_choice=forced, parallel_tool_calls=False)
    (call,), words = called.choices[0].message.tool_calls or [], called.choices[0].message.content
    assert words is None and call.type == "function" and call.function.name == "g"
    assert json.loads(call.function.arguments)["a"] in (3, 4)
    with client.chat.completions.stream(**asked, tools=tools, tool_choice=forced) as pieces:
        (streamed,) = pieces.get_final_completion().choices[0].message.tool_calls or []
    assert (streamed.function.name, streamed.function.arguments) == ("g", call.function.arguments)
    stream = client.chat.completions.create(**asked, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == plain.outputs[0].text
    tokens = running.post("/tokenize", b'{"prompt": "abc"}')[1]
    assert tokens["tokens"] == [97, 98, 99]
    shown = running.post("/tokenize", json.dumps({"messages": messages, "tools": tools}).encode())[1]
    assert bytes(shown["tokens"]) == b"<user>hiT2>"
    assert bytes(running.llm.texts.render_chat(messages)) == b"<user>hi>"


@pytest.mark.parametrize(
    ("field", "status"),
    [({"return_token_strs": True}, 400), ({"model": "other"}, 404), ({"messages": []}, 400), ({"prompt": ["a"]}, 400)],
)
def test_what_would_change_the_tokens_is_not_passed_over(running: Running, field: Any, status: int) -> None:
    assert running.post("/tokenize", json.dumps({"prompt": "abc", **field}).encode())[0] == status


def test_stop_texts_end_an_answer_and_are_not_shown(running: Running) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "x", "temperature": 1.5, "seed": 3, "max_tokens": 60}
    whole = running.client.completions.create(**asked).choices[0].text
    stop = whole[10:12]
    choice = running.client.completions.create(**asked, stop=[stop]).choices[0]
    assert choice.text == whole[: whole.find(stop)] and choice.finish_reason == "stop"


DEEP = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HOSTILE: dict[str, tuple[bytes, int]] = {
    "no json": (b"\xff\xfe{", 400),
    "deep": (DEEP, 413),
    "deep, but short": (b"[" * 90_000, 400),
    "long": (b'{"prompt": "' + b"a" * 300_000 + b'"}', 413),
    "a list": (b"[]", 400),
    "huge n": (b'{"prompt": "a", "n": 1000000000}', 400),
    "negative": (b'{"prompt": "a", "max_tokens": -5}', 400),
    "nan": (b'{"prompt": "a", "temperature": NaN}', 400),
    "infinite": (b'{"prompt": "a", "top_p": 1e999}', 400),
    "text for a number": (b'{"prompt": "a", "temperature": "hot"}', 400),
    "too long for the model": (b'{"prompt": "' + b"a" * 500 + b'"}', 400),
    "empty": (b'{"prompt": ""}', 400),
    "no prompt": (b"{}", 400),
    "token outside": (b'{"prompt": [3, 99999]}', 400),
    "huge token": (b'{"prompt": [' + b"9" * 4000 + b"]}", 400),
    "another model": (b'{"model": "gpt-4", "prompt": "a"}', 404),
    "unknown field": (b'{"prompt": "a", "suffix": "b"}', 400),
    "bias": (b'{"prompt": "a", "logit_bias": {"x": 1}}', 400),
    "bias outside": (b'{"prompt": "a", "logit_bias": {"257": 1}}', 400),
    "surrogate": (b'{"prompt": "\\ud800"}', 400),
    "many prompts": (b'{"prompt": [' + b'"a",' * 1000 + b'"a"]}', 400),
    "stop": (b'{"prompt": "a", "stop": [""]}', 400),
    "stream options": (b'{"prompt": "a", "stream_options": {"include_usage": true}}', 400),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_and_the_server_lives(running: Running, name: str) -> None:
    data, status = HOSTILE[name]
    found, body = running.post("/v1/completions", data)
    assert found == status and body["error"]["message"], body
    if name in ("no json", "deep, but short", "surrogate"):
        wrapped = data if name != "surrogate" else b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
        assert running.post("/v1/chat/completions", wrapped)[0] == 400
    assert running.post("/v1/completions", b'{"prompt": "a", "max_tokens": 1}')[0] == 200


def test_a_key_a_path_and_a_method_are_asked_for(running: Running) -> None:
    assert running.post("/v1/completions", b'{"prompt": "a"}', key="wrong")[0] == 401
    assert running.post("/v1/embeddings", b"{}")[0] == 404
    assert running.post("/v1/models", b"{}")[0] == 405
    assert json.loads(running.get("/health")) == {"status": "ok"}


async def one_client(port: int, draw: random.Random) -> str:
    """Asks for something, and leaves in the middle one time in three."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stream = draw.random() < 0.6
    body = json.dumps(
        {
            "prompt": "".join(draw.choice("abc") for _ in range(draw.randrange(1, 60))),
            "max_tokens": draw.randrange(1, 40),
            "stream": stream,
            "n": draw.choice([1, 1, 2]),
            "ignore_eos": True,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    try:
        if draw.random() < 0.33:
            await asyncio.sleep(draw.random() * 0.2)
            if draw.random() < 0.5:
                await reader.read(50)
            writer.transport.abort()
            return "left"
        answer = await asyncio.wait_for(reader.read(), 120)
    finally:
        writer.close()
    status = answer.split(b" ", 2)[1].decode()
    if status == "200":
        assert (b"data: [DONE]" in answer) == stream
        assert b'"finish_reason": "length"' in answer or b'"finish_reason":"length"' in answer
    return status


def test_a_load_with_clients_that_leave_loses_nothing(running: Running) -> None:
    draws = [random.Random(number) for number in range(200)]

    async def load() -> list[str]:
        gate = asyncio.Semaphore(40)

        async def one(draw: random.Random) -> str:
            async with gate:
                return await one_client(running.port, draw)

        return await asyncio.gather(*(one(draw) for draw in draws))

    found = asyncio.run(load())
    assert set(found) <= {"200", "429", "left"} and found.count("200") > 90 and found.count("left") > 40
    assert running.idle(), "blocks or requests are left"
    shown = running.get("/metrics")
    assert "megatron_ds_running 0.0" in shown
    times = [re.search(rf"time_{name}_seconds_count (\d+)", shown) for name in ("to_first_token", "per_output_token")]
    assert times[0] is not None and times[1] is not None
    assert int(times[0][1]) >= found.count("200") > int(times[1][1]) / 2 > 0


def test_an_answer_in_one_piece_is_told_of_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of every answer so far, after every step, would be quadratic in its length."""
    engine, told = running.server.engine, []
    tell = engine._tell
    monkeypatch.setattr(engine, "_tell", lambda name, what: (told.append(what), tell(name, what)))
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 9, "n": 2}
    asked["extra_body"] = {"ignore_eos": True}
    running.client.completions.create(**asked)
    assert [what.finished for what in told] == [True, True]
    for _ in running.client.completions.create(**asked, stream=True):
        pass
    assert len(told) > 10


def test_more_than_the_server_takes_is_told_to_come_back(folder: Path) -> None:
    server = Running(folder, max_requests=2)
    try:
        status, answer = server.post("/v1/completions", b'{"prompt": ["a", "b", "c"]}')  # however often it comes back
        assert status == 400 and "3 prompts, of which this server takes 2 at one time" in answer["error"]["message"]
        server.server.engine._heard["another"] = print
        assert server.post("/v1/completions", b'{"prompt": ["a", "b"]}')[0] == 429
        del server.server.engine._heard["another"]
        assert server.post("/v1/completions", b'{"prompt": ["a", "b"], "max_tokens": 1}')[0] == 200
    finally:
        server.close()


def test_an_answer_that_takes_too_long_is_ended(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    step = running.llm.engine.step
    monkeypatch.setattr(running.llm.engine, "step", lambda: (time.sleep(0.05), step())[1])
    asked = {"prompt": "a", "max_tokens": 110, "ignore_eos": True}
    monkeypatch.setattr(running.server.engine, "_seconds", 0.0)
    status, answer = running.post("/v1/completions", json.dumps(asked).encode())
    assert status == 504 and "taken too long" in answer["error"]["message"]
    assert running.idle(), "it is still computed"
    monkeypatch.setattr(running.server.engine, "_seconds", 1.0)
    fields: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 110, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.APIError, match="taken too long"):
        for _ in running.client.completions.create(**fields, stream=True):
            pass
    assert running.idle(), "it is still computed"
    monkeypatch.undo()
    assert running.post("/v1/completions", b'{"prompt": "a", "max_tokens": 1}')[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_server, "_BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n"
        slow.sendall(f"{head}content-length: 99\r\n\r\n".encode() + b'{"prompt":')
        said = b"".join(iter(lambda: slow.recv(4096), b"")).decode()
    assert said.startswith("HTTP/1.1 408") and "within 0.3 s" in said


def test_a_failed_engine_answers_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Running(folder)
    try:
        monkeypatch.setattr(server.llm.engine, "_sample", lambda *_: 1 / 0)
        status, body = server.post("/v1/completions", b'{"prompt": "a"}')
        assert status == 500 and "ZeroDivisionError" in body["error"]["message"]
        assert server.post("/v1/completions", b'{"prompt": "a"}')[0] == 503
        with pytest.raises(urllib.error.HTTPError, match="503"):
            server.get("/health")
    finally:
        server.close()
