"""An HTTP server with OpenAI's interface: one thread computes, one event loop talks to the clients."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import queue
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_ds.errors import ConfigError
from megatron_ds.inference.llm import LLM
from megatron_ds.inference.openai_answers import Answers
from megatron_ds.inference.openai_protocol import BadRequest, Call, read_call
from megatron_ds.inference.outputs import RequestOutput
from megatron_ds.inference.serving_engine import PromptTooLongError
from megatron_ds.inference.serving_options import ServerOptions

T = TypeVar("T")


Update = tuple[int, RequestOutput]
"""A call's prompt that has got further, by its number, and what there is of its answers."""
_Hear = Callable[[RequestOutput | BaseException], None]
_BODY_SECONDS = 30.0
"""Within which the body of a request has to come."""
_LOOKS_AROUND = 1.0
"""Seconds without a request after which the server sees whether its other ranks are there."""


class EngineThread:
    """Runs the steps; the event loop asks it for answers and hears of what comes of them.

    Args:
        most: prompts that are under way at one time at most. seconds: that a call may take.

    Attributes:
        on_failure: called in its thread when it has failed, and everybody has been told.
    """

    def __init__(self, llm: LLM, most: int, seconds: float):
        self.llm, self._most, self._seconds = llm, most, seconds
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.refused = 0
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._heard: dict[str, _Hear] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def under_way(self) -> int:
        return len(self._heard)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._asked.put(None)
        self._thread.join(timeout=60)

    async def answers(self, call: Call) -> AsyncGenerator[Update, None]:
        """What comes of a call's prompts, until all have ended. Where nobody listens any more, they are aborted."""
        if len(call.prompts) > self._most:  # of which no later try would come to anything
            raise BadRequest(
                f"{len(call.prompts)} prompts, of which this server takes {self._most} at one time", "prompt"
            )
        if self.under_way + len(call.prompts) > self._most:
            self.refused += 1
            raise BadRequest(f"{self.under_way} requests are under way; come back later", status=429)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._seconds
        told: asyncio.Queue[tuple[int, RequestOutput | BaseException]] = asyncio.Queue()
        names = [f"{secrets.token_hex(12)}-{prompt}" for prompt in range(len(call.prompts))]
        left = len(names)

        def tell(prompt: int, what: RequestOutput | BaseException) -> None:
            loop.call_soon_threadsafe(told.put_nowait, (prompt, what))

        try:
            for prompt, name in enumerate(names):
                self._add(name, call, prompt, partial(tell, prompt))
            while left:
                async with asyncio.timeout_at(deadline):
                    prompt, what = await told.get()
                if isinstance(what, BaseException):
                    raise what
                left -= what.finished
                yield prompt, what
        except TimeoutError:
            raise BadRequest("the request has taken too long", status=504) from None
        finally:
            for name in names:
                if self._heard.pop(name, None) is not None:
                    self._asked.put(partial(self.llm.engine.abort, name))

    def _add(self, name: str, call: Call, prompt: int, hear: _Hear) -> None:
        self._heard[name] = hear

        def begin() -> None:
            try:
                self.llm.add(call.prompts[prompt], call.params, whole=not call.stream, name=name)
            except ConfigError as error:
                code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None
                self._tell(name, BadRequest(str(error), code=code))

        self._asked.put(begin)
        if self.failure is not None:  # nobody will begin it
            self._tell(name, BadRequest("the engine has failed; see /health", status=503))

    def _tell(self, name: str, what: RequestOutput | BaseException) -> None:
        ended = not isinstance(what, RequestOutput) or what.finished
        hear = self._heard.pop(name, None) if ended else self._heard.get(name)
        if hear is not None:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                hear(what)

    def _run(self) -> None:
        try:
            while True:
                wait = not self.llm.engine.has_work
                with contextlib.suppress(queue.Empty):
                    while True:
                        asked = self._asked.get(block=wait, timeout=_LOOKS_AROUND)
                        if asked is None:
                            return
                        asked()
                        wait = False
                if self.llm.engine.has_work:
                    for output in self.llm.step():
                        self._tell(output.request_id, output)
                else:
                    self.llm.require_ranks()
        except BaseException as error:
            self.failure = error
            for name in list(self._heard):
                self._tell(name, BadRequest(f"the engine has failed: {type(error).__name__}: {error}", status=500))
            self.on_failure()


class Server:
    """The application: ``app`` is ASGI."""

    def __init__(self, llm: LLM, options: ServerOptions):
        self.llm, self.options = llm, options
        self.model = options.served_model_name or Path(llm.options.model).resolve().name
        self.engine = EngineThread(llm, options.max_requests, options.request_timeout)
        self.started = int(time.time())
        registry = CollectorRegistry()
        registry.register(self)
        self._registry = registry
        routes = [
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{model:path}", self._guarded(self._model)),
            Route("/v1/completions", self._guarded(partial(self._answer, chat=False)), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(partial(self._answer, chat=True)), methods=["POST"]),
            Route("/tokenize", self._guarded(self._tokenize), methods=["POST"]),
            Route("/detokenize", self._guarded(self._detokenize), methods=["POST"]),
            Route("/health", self._health),
            Route("/ping", self._health, methods=["GET", "POST"]),
            Route("/metrics", self._metrics),
        ]
        handlers: Any = dict.fromkeys((BadRequest, ConfigError, HTTPException, Exception), _refused)
        self.app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.stop)

    # Endpoints

    def _guarded(self, endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def guarded(request: Request) -> Response:
            key = self.options.api_key
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
                raise BadRequest("give the server's API key as a bearer token", None, 401, "invalid_api_key")
            answer: Response = await endpoint(request)
            return answer

        return guarded

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    def _about(self) -> dict[str, Any]:
        about = {"id": self.model, "object": "model", "created": self.started, "owned_by": "megatron-ds"}
        return {**about, "max_model_len": self.llm.engine.max_model_len}

    async def _health(self, request: Request) -> Response:
        if self.engine.failure is not None:
            return JSONResponse({"status": "failed", "error": str(self.engine.failure)}, 503)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4")

    async def _model(self, request: Request) -> Response:
        asked = request.path_params["model"]
        if asked != self.model:
            raise BadRequest(f"the model {asked!r} is not served here", "model", 404, "model_not_found")
        return JSONResponse(self._about())

    async def _tokenize(self, request: Request) -> Response:
        body = await self._json(request)
        chat = isinstance(body, dict) and "messages" in body
        if not chat and not (isinstance(body, dict) and isinstance(body.get("prompt"), str)):
            raise BadRequest("prompt must be a text, or messages a conversation", "prompt")
        tokens = read_call(body, chat, self.model, self.llm.texts).prompts[0]
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self.llm.engine.max_model_len})

    async def _detokenize(self, request: Request) -> Response:
        body = await self._json(request)
        tokens, last = body.get("tokens") if isinstance(body, dict) else None, self.llm.engine.vocab_size - 1
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token <= last for token in tokens):
            raise BadRequest(f"tokens must be a list of token ids, 0 to {last}", "tokens")
        return JSONResponse({"prompt": self.llm.texts.decode(tokens)})

    async def _answer(self, request: Request, chat: bool) -> Response:
        body = await self._json(request)
        call = read_call(body, chat, self.model, self.llm.texts, self.llm.suggested)
        updates, answers = self.engine.answers(call), Answers(call, self.llm.texts)
        if call.stream:
            pieces = _events(answers, await _while_there(request, anext(updates)), updates)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        ended = sorted(await _while_there(request, _all(updates)), key=lambda update: update[0])
        return JSONResponse(answers.whole([output for _, output in ended]))

    async def _json(self, request: Request) -> Any:
        data = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self.options.max_body_mb * 1e6:
                        raise BadRequest(f"the body is longer than {self.options.max_body_mb} MB", status=413)
            return json.loads(data)
        except TimeoutError:
            raise BadRequest(f"the body has not come within {_BODY_SECONDS:g} s", status=408) from None
        except ClientDisconnect:
            raise BadRequest("the client has left", status=499) from None
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is no JSON: {error}") from None

    # Prometheus

    def collect(self) -> Any:
        """What ``/metrics`` shows, at this moment; called by the registry."""
        engine, batcher = self.llm.engine, self.llm.engine.batcher
        counters = engine.counters
        used = 1.0 - batcher.pool.free / batcher.pool.count
        for name, text, value in (
            ("running", "Sequences that are computed.", len(batcher.running)),
            ("waiting", "Sequences that wait.", len(batcher.waiting)),
            ("kv_cache_usage_ratio", "Blocks of the key/value cache that are held.", used),
        ):
            yield GaugeMetricFamily(f"megatron_ds_{name}", text, value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts.", counters.prompt_tokens),
            ("cached_prompt_tokens", "Tokens of prompts that were in the cache.", counters.cached_tokens),
            ("generation_tokens", "Tokens of answers.", counters.answer_tokens),
            ("guessed_tokens", "Tokens of answers that were guessed and right.", counters.drafted_tokens),
            ("steps", "Batches.", counters.steps),
            ("step_seconds", "Time of all batches.", counters.step_seconds),
            ("compute_seconds", "Of it, the model's and the choice of tokens.", counters.compute_seconds),
            ("preemptions", "Sequences that gave up their blocks and were computed again.", batcher.preemptions),
            ("refused", "Requests that were told to come back later.", self.engine.refused),
        ):
            yield CounterMetricFamily(f"megatron_ds_{name}", text, value)
        finished = CounterMetricFamily("megatron_ds_finished", "Answers by how they ended.", labels=["reason"])
        for reason, count in list(counters.finished.items()):
            finished.add_metric([reason], count)
        yield finished
        for name, text, times in (
            ("time_to_first_token", "From a request's arrival to its first token.", counters.first_tokens),
            ("time_per_output_token", "From token to token, the mean of each answer.", counters.token_times),
        ):
            name = f"megatron_ds_{name}_seconds"
            yield HistogramMetricFamily(name, text, buckets=times.buckets(), sum_value=times.seconds)


async def _while_there(request: Request, answer: Awaitable[T]) -> T:
    """``answer``, as long as the client waits for it."""
    waiting = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait({waiting}, timeout=0.5))[0]:
            if await request.is_disconnected():
                raise BadRequest("the client has left", status=499)
        return await waiting
    finally:
        waiting.cancel()


async def _all(updates: AsyncGenerator[Update, None]) -> list[Update]:
    return [update async for update in updates]


async def _events(answers: Answers, first: Update, updates: AsyncGenerator[Update, None]) -> AsyncIterator[str]:
    """Server-sent events. Where the client leaves, the request ends with this generator."""
    try:
        async with contextlib.aclosing(updates):
            for piece in answers.pieces(*first):
                yield _event(piece)
            async for update in updates:
                for piece in answers.pieces(*update):
                    yield _event(piece)
        for piece in answers.last_pieces():
            yield _event(piece)
        yield "data: [DONE]\n\n"
    except BadRequest as error:
        yield _event(error.body())


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = BadRequest(error.detail, status=error.status_code)
    elif isinstance(error, ConfigError):
        error = BadRequest(str(error))
    elif not isinstance(error, BadRequest):  # a defect
        error = BadRequest(f"{type(error).__name__}: {error}", status=500)
    return JSONResponse(error.body(), error.status, {"retry-after": "1"} if error.status == 429 else None)
