"""``megatron-ds serve FOLDER``: a server with OpenAI's interface for a checkpoint or a folder of transformers."""

from __future__ import annotations

import contextlib
import inspect
import signal
import socket
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_ds.errors import ConfigError, MegatronDSError
from megatron_ds.kernels.cpu.allocator import keep_freed_memory

DESCRIPTION = """Serve a model to OpenAI clients: /v1/completions, /v1/chat/completions, /v1/models.

megatron-ds serve runs/mine/hf --port 8000

megatron-ds serve runs/mine/checkpoints --tensor-parallel-size 2 --api-key secret

curl localhost:8000/v1/completions -d '{"prompt": "Once", "max_tokens": 20}'
"""


@dataclass(frozen=True)
class Serve:
    """What to serve, to whom, and how much at one time."""

    model: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """A run's checkpoint directory, one step's directory, or a folder of transformers."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 for all of this machine's."""
    port: int = 8000
    """0: a free one."""
    api_key: str | None = None
    """That clients must give. Default: none."""
    served_model_name: str | None = None
    """The name that clients ask for. Default: the folder's."""
    tokenizer: Path | None = None
    """Where the tokenizer is, if not with the model."""
    tensor_parallel_size: int = 1
    """Ranks that every layer's weights are split over."""
    pipeline_parallel_size: int = 1
    """Ranks that the layers are split over."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """auto: what most weights have."""
    quantization: Literal["int8", "w8a8", "fp8", "int4"] | None = None
    """Weights of fewer bits. Default: as they are."""
    max_model_len: int | None = None
    """Tokens of prompt and answer. Default: what the model was made for."""
    max_num_seqs: int = 64
    """Sequences that are computed at one time."""
    max_num_batched_tokens: int = 2048
    """Tokens of a step; longer prompts are computed in chunks."""
    gpu_memory_utilization: float = 0.9
    """Part of the GPU's memory (of a CPU's free memory) to use."""
    num_blocks: int | None = None
    """Blocks of the key/value cache. Default: what fits."""
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8"] = "auto"
    """auto: the model's; fp8: half of 16 bits' memory, with a scale for each token and head."""
    num_speculative_tokens: int = 0
    """Guess so many tokens from what followed the same words before; answers stay the same."""
    speculative_model: Path | None = None
    """A small model of the same vocabulary that guesses them instead."""
    enable_prefix_caching: bool = True
    """Share keys and values of texts that begin alike."""
    enforce_eager: bool = True
    """Start at once. Else the model is compiled first (on a CPU, in half precision), and steps are faster then."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: requests that do not say how tokens are drawn take the model's generation_config.json."""
    max_requests: int = 256
    """Prompts under way; more are told to come back later (429)."""
    max_body_mb: float = 4.0
    """Size of a request's body."""
    request_timeout: float = 600.0
    """Seconds that a request may take."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each rank where there is one."""


def serve(options: Serve) -> int:
    """Serve until SIGINT or SIGTERM; what is under way is answered first."""
    try:
        import uvicorn

        from megatron_ds.inference.openai_server import Limits, Server
    except ImportError as error:
        raise ConfigError(f"the server needs {error.name}: pip install 'megatron-ds[serve]'") from None
    from megatron_ds.inference.llm import LLM

    o = options
    listening = _listen(o.host, o.port)
    taken = inspect.signature(LLM).parameters.keys() - {"model"}
    engine = {field.name: getattr(o, field.name) for field in fields(o) if field.name in taken}
    with LLM(o.model, **engine) as llm:
        keep_freed_memory()  # of the steps, not of what loading has freed
        limits = Limits(o.max_requests, int(o.max_body_mb * 1e6), o.request_timeout, o.api_key)
        name = o.served_model_name or o.model.resolve().name
        app = Server(llm, name, limits).app
        pool = llm.engine.batcher.pool
        host, port = listening.getsockname()[:2]
        print(
            f"{name}: texts of up to {llm.engine.max_model_len} tokens, a cache of {pool.count * pool.size} tokens, at "
            f"http://{host}:{port}/v1",
            flush=True,
        )
        config = uvicorn.Config(
            app,
            log_level="warning",
            timeout_graceful_shutdown=int(o.request_timeout),
            h11_max_incomplete_event_size=65536,
        )
        # uvicorn answers what is under way and raises the signal again: here, so that the other ranks end as well.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
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
    options = tyro.cli(Serve, prog="megatron-ds serve", description=DESCRIPTION, args=arguments[1:])
    try:
        return serve(options)
    except MegatronDSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
