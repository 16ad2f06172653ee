"""An HTTP server with OpenAI's interface: one thread computes, one event loop talks to the clients."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import queue
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

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

log = logging.getLogger(__name__)


class EngineThread:
    """Runs the steps; other threads ask it for requests and hear of what comes of them."""

    def __init__(self, llm: LLM):
        self.llm = llm
        self.failure: BaseException | None = None
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._heard: dict[str, Callable[[RequestOutput | BaseException], None]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def under_way(self) -> int:
        return len(self._heard)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._asked.put(None)
        self._thread.join(timeout=60)

    def add(self, name: str, call: Call, prompt: int, hear: Callable[[RequestOutput | BaseException], None]) -> None:
        self._heard[name] = hear

        def begin() -> None:
            try:
                self.llm.engine.add(name, call.prompts[prompt], self.llm.seeded(call.params), whole=not call.stream)
            except ConfigError as error:
                code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None
                self._tell(name, BadRequest(str(error), code=code))

        self._asked.put(begin)
        if self.failure is not None:  # between a client's question and this: nobody will begin it
            self._tell(name, BadRequest("the engine has failed; see /health", status=503))

    def abort(self, name: str) -> None:
        if self._heard.pop(name, None) is not None:
            self._asked.put(lambda: self.llm.engine.abort(name))

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
                        asked = self._asked.get(block=wait)
                        if asked is None:
                            return
                        asked()
                        wait = False
                if self.llm.engine.has_work:
                    for output in self.llm.step():
                        self._tell(output.request_id, output)
        except BaseException as error:
            log.exception("the engine has failed; /health says so from now on")
            self.failure = error
            for name in list(self._heard):
                self._tell(name, BadRequest(f"the engine has failed: {type(error).__name__}: {error}", status=500))


class Server:
    """The application: ``app`` is ASGI."""

    def __init__(self, llm: LLM, options: ServerOptions):
        self.llm, self.options = llm, options
        self.model = options.served_model_name or Path(llm.options.model).resolve().name
        self.engine = EngineThread(llm)
        self.started = int(time.time())
        self.refused = 0
        registry = CollectorRegistry()
        registry.register(self)
        self._registry = registry
        routes = [
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{model:path}", self._guarded(self._model)),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/tokenize", self._guarded(self._tokenize), methods=["POST"]),
            Route("/detokenize", self._guarded(self._detokenize), methods=["POST"]),
            Route("/health", self._health),
            Route("/ping", self._health, methods=["GET", "POST"]),
            Route("/metrics", self._metrics),
        ]
        handlers: Any = {BadRequest: _refused, ConfigError: _refused, HTTPException: _not_found, Exception: _defect}
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

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, chat: bool) -> Response:
        body = await self._json(request)
        call = read_call(body, chat, self.model, self.llm.texts, self.llm.suggested)
        if self.engine.under_way + len(call.prompts) > self.options.max_requests:
            self.refused += 1
            raise BadRequest(f"{self.engine.under_way} requests are under way; come back later", status=429)
        if self.engine.failure is not None:
            raise BadRequest("the engine has failed; see /health", status=503)
        served = _Served(self.engine, call, self.options.request_timeout)
        answers = Answers(call, self.llm.texts)
        if call.stream:
            first = await self._first(request, served)
            pieces = _pieces(served, answers, first)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        while not served.finished:
            await self._first(request, served)
        return JSONResponse(answers.whole(served.outputs))

    async def _first(self, request: Request, served: _Served) -> tuple[int, RequestOutput]:
        """What comes next, as long as the client is there."""
        waiting = asyncio.ensure_future(served.next())
        try:
            while not (await asyncio.wait({waiting}, timeout=0.5))[0]:
                if await request.is_disconnected():
                    raise BadRequest("the client has left", status=499)
            return await waiting
        except BaseException:
            waiting.cancel()
            served.abort()
            raise

    async def _json(self, request: Request) -> Any:
        data = bytearray()
        try:
            async with asyncio.timeout(30):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self.options.max_body_mb * 1e6:
                        raise BadRequest(f"the body is longer than {self.options.max_body_mb} MB", status=413)
            return json.loads(data)
        except TimeoutError:
            raise BadRequest("the body has not come within 30 s", status=408) from None
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
            ("refused", "Requests that were told to come back later.", self.refused),
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


class _Served:
    """The prompts of one call on their way through the engine."""

    def __init__(self, engine: EngineThread, call: Call, seconds: float):
        self._engine, loop = engine, asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, RequestOutput | BaseException]] = asyncio.Queue()
        self._deadline = loop.time() + seconds
        self._latest: list[RequestOutput | None] = [None] * len(call.prompts)
        self._names = [f"{secrets.token_hex(12)}-{prompt}" for prompt in range(len(call.prompts))]

        def hear(prompt: int, what: RequestOutput | BaseException) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, (prompt, what))

        for prompt, name in enumerate(self._names):
            engine.add(name, call, prompt, partial(hear, prompt))

    @property
    def outputs(self) -> list[RequestOutput]:
        return [output for output in self._latest if output is not None]

    @property
    def finished(self) -> bool:
        return all(output is not None and output.finished for output in self._latest)

    async def next(self) -> tuple[int, RequestOutput]:
        """The prompt that has got further, and what there is of its answers."""
        try:
            async with asyncio.timeout_at(self._deadline):
                prompt, what = await self._queue.get()
        except TimeoutError:
            raise BadRequest("the request has taken too long", status=504) from None
        if isinstance(what, BaseException):
            raise what
        self._latest[prompt] = what
        return prompt, what

    def abort(self) -> None:
        for name in self._names:
            self._engine.abort(name)


async def _pieces(served: _Served, answers: Answers, first: tuple[int, RequestOutput]) -> AsyncIterator[str]:
    """Server-sent events. Where the client leaves, the request ends with this generator."""
    try:
        prompt, output = first
        while True:
            for piece in answers.pieces(prompt, output):
                yield _event(piece)
            if served.finished:
                break
            prompt, output = await served.next()
        last = answers.last_piece(served.outputs)
        if last is not None:
            yield _event(last)
        yield "data: [DONE]\n\n"
    except BadRequest as error:
        yield _event(error.body())
    finally:
        served.abort()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


async def _refused(request: Request, error: Exception) -> Response:
    error = error if isinstance(error, BadRequest) else BadRequest(str(error))
    headers = {"retry-after": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(BadRequest(error.detail, status=error.status_code).body(), error.status_code)


async def _defect(request: Request, error: Exception) -> Response:
    return JSONResponse(BadRequest(f"{type(error).__name__}: {error}", status=500).body(), 500)
