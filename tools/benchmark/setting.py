"""The workload every contestant runs and the one clock that times them all.

Contestants share this file and nothing else: the sizes, the random tokens, the optimizer's settings, and
:func:`measure`, which times a step function. It imports torch alone, so that it works in the peers' environment,
where megatron_ds is not installed.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Workload:
    """A model, a batch and an optimizer; by default GPT-2's architecture, small enough for a CPU, without dropout.

    ``family``: ``"gpt2"`` (tied embeddings, learned positions) or ``"llama"`` (rotary, RMSNorm, SwiGLU, untied).
    ``kv_heads`` and ``ffn_hidden``: as many as ``heads``, and the family's width, where they are None.
    ``batch`` is the global batch in sequences, which one rank takes in ``accumulate`` micro-batches. ``dtype`` is
    ``"fp32"``, ``"bf16"`` (fp32 weights in the optimizer, bf16 matmuls) or ``"bf16-pure"`` (bf16 weights and
    optimizer state, no fp32 copy); ``fp8`` a recipe of ours for linear layers.
    """

    family: str = "gpt2"
    layers: int = 6
    hidden: int = 384
    heads: int = 6
    kv_heads: int | None = None
    ffn_hidden: int | None = None
    sequence: int = 256
    vocab: int = 8192
    batch: int = 8
    accumulate: int = 1
    dtype: str = "fp32"
    fp8: str = "none"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens in one step of the whole job."""
        return self.batch * self.sequence

    @property
    def ffn(self) -> int:
        """Width inside the MLP: 4 h, or for SwiGLU 8/3 h rounded up to a multiple of 64."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        return -(-8 * self.hidden // (3 * 64)) * 64 if self.family == "llama" else 4 * self.hidden

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, PaLM's convention (arXiv 2204.02311, appendix B): 6N + 12 L h s.

        N is the number of weights that multiply a token: the head but no embedding table, the blocks' matrices. The
        square of attention scores counts whole although it is causal; recomputation does not count.
        """
        mlp = 3 * self.ffn if self.family == "llama" else 2 * self.ffn
        attention = 2 * self.hidden * (1 + (self.kv_heads or self.heads) / self.heads)  # q and out; k and v
        weights = self.layers * (attention + mlp) * self.hidden + self.vocab * self.hidden
        return 6.0 * weights + 12.0 * self.layers * self.hidden * self.sequence

    def batches(
        self, rank: int = 0, ranks: int = 1, device: str = "cpu"
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """A function that draws this rank's next ``(tokens, targets)``, both int64 ``[batch / ranks, sequence]``."""
        generator = torch.Generator().manual_seed(1234 + rank)
        local = self.batch // ranks

        def draw() -> tuple[torch.Tensor, torch.Tensor]:
            block = torch.randint(0, self.vocab, (local, self.sequence + 1), generator=generator)
            return block[:, :-1].contiguous().to(device), block[:, 1:].contiguous().to(device)

        return draw


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """nanoGPT's two groups: matrices and embeddings decay, biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def peak_rss_mib() -> float:
    """Largest resident set of this process since it started, in MiB (the interpreter and torch included)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(
    step: Callable[[], Any],
    workload: Workload,
    warmup: int,
    steps: int,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Run ``warmup + steps`` steps and return the figures of the timed ones.

    With several ranks the clock is shared: a barrier before the timed part, and the rate is that of the whole job.
    ``step`` returns the loss (or None on a rank that has none); it is kept to show that the contestant trains.
    ``synchronize`` waits for the device, at both ends of a timed step.

    Returns:
        ``tokens_per_s`` of the median step by wall clock; ``cpu_tokens_per_s``, the same by this process's own CPU
        seconds (what is left when others disturb the machine); ``step_s``, the list of wall times; ``rss_mib``, the
        peak; ``base_rss_mib``, what was resident before the first step's activations; ``loss``, first and last.
    """
    base = peak_rss_mib()
    losses = []
    distributed = dist.is_available() and dist.is_initialized()
    for _ in range(warmup):
        losses.append(step())
    if distributed:
        dist.barrier()
    synchronize()
    wall, cpu = [], []
    for _ in range(steps):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(step())
        synchronize()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    if distributed:
        dist.barrier()
    known = [float(loss) for loss in losses if loss is not None]
    return {
        "tokens_per_s": workload.tokens / statistics.median(wall),
        "cpu_tokens_per_s": workload.tokens / statistics.median(cpu),
        "step_s": wall,
        "rss_mib": peak_rss_mib(),
        "base_rss_mib": base,
        "loss": [known[0], known[-1]] if known else None,
    }


def report(figures: dict[str, Any], workload: Workload) -> None:
    """Write one contestant's figures, as one line of JSON, to the file named by ``BENCHMARK_OUT`` or to stdout.

    A file and not a pipe: peers print banners of their own.
    """
    line = json.dumps({**figures, "workload": asdict(workload)})
    path = os.environ.get("BENCHMARK_OUT")
    if path:
        with open(path, "w", encoding="utf-8") as out:
            out.write(line + "\n")
    else:
        print(line)
