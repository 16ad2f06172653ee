"""``megatron-ds serve FOLDER``: a server with OpenAI's interface for a checkpoint or a folder of transformers."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from functools import partial

import tyro

from megatron_ds.data.cli import guarded
from megatron_ds.errors import ConfigError
from megatron_ds.inference.serving_options import ServeOptions
from megatron_ds.kernels.cpu.allocator import keep_freed_memory

DESCRIPTION = """Serve a model to OpenAI clients: /v1/completions, /v1/chat/completions, /v1/models.

megatron-ds serve runs/mine/hf --port 8000

megatron-ds serve runs/mine/checkpoints --tensor-parallel-size 2 --api-key secret

curl localhost:8000/v1/completions -d '{"prompt": "Once", "max_tokens": 20}'
"""


def serve(options: ServeOptions) -> int:
    """Serve until SIGINT or SIGTERM; what is under way is answered first. On other ranks than the first: take part.

    Raises:
        BaseException: that ended the engine, when all clients have been told.
    """
    try:
        import uvicorn

        from megatron_ds.inference.openai_server import Server
    except ImportError as error:
        raise ConfigError(f"the server needs {error.name}: pip install 'megatron-ds[serve]'") from None
    from megatron_ds.inference.follower import follow
    from megatron_ds.inference.llm import LLM
    from megatron_ds.inference.ranks import rank_of_launch

    o = options
    if rank_of_launch() > 0:
        follow(o.engine_arguments())
        return 0
    listening = _listen(o.host, o.port)
    # So that the other ranks end as well. uvicorn answers what is under way, and raises the signal again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with LLM(**o.engine_arguments()) as llm:
        keep_freed_memory()  # of the steps, not of what loading has freed
        server = Server(llm, o)
        pool = llm.engine.batcher.pool
        host, port = listening.getsockname()[:2]
        print(
            f"{server.model}: texts of up to {llm.engine.max_model_len} tokens, a cache of {pool.count * pool.size} "
            f"tokens, at http://{host}:{port}/v1",
            flush=True,
        )
        config = uvicorn.Config(
            server.app,
            log_level="warning",
            timeout_graceful_shutdown=int(o.request_timeout),
            h11_max_incomplete_event_size=65536,
        )
        running = uvicorn.Server(config)
        server.engine.on_failure = partial(setattr, running, "should_exit", True)
        with contextlib.suppress(KeyboardInterrupt):
            running.run(sockets=[listening])
        if server.engine.failure is not None:
            raise server.engine.failure
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded, which may take minutes."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen at {host}:{port}: {error}; choose another with --port or --host") from None
    return listening


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] != ["serve"]:
        print("usage: megatron-ds serve FOLDER ...   (megatron-ds serve --help says what else)", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    cli = partial(tyro.cli, ServeOptions, prog="megatron-ds serve", description=DESCRIPTION, args=arguments[1:])
    return guarded(lambda: serve(cli()))


if __name__ == "__main__":
    raise SystemExit(main())
