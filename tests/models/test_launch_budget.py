"""How many kernels a step launches on one GPU and how many bytes they move: a budget, counted on the meta device.

Whoever changes a step on purpose writes the new numbers here; they may fall, and rise only for a reason.
"""

from __future__ import annotations

import sys
from functools import cache
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from launches import Count, counted, most_bytes
from torch import Tensor, nn

from megatron_ds.config import RunConfig, from_dict
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.kernels import float8_product, registry
from megatron_ds.layers import loss
from megatron_ds.layers.loss import Logits, linear_cross_entropy
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.dit_task import DiTTask
from megatron_ds.models.gpt import GPTTask
from megatron_ds.train.build import RankRuntime, build
from megatron_ds.zero.main_grad import MainGradient

LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"hidden_size": 768, "num_heads": 12, "vocab_size": 50304, "max_positions": 1024},
    "llama": {"hidden_size": 2048, "num_heads": 16, "vocab_size": 32000, "max_positions": 2048, **LLAMA},
}


TOKENS = 8192  # of a micro-batch: the loss takes them in one chunk, those of GPT-2 in two


class Run(NamedTuple):
    model: str
    layers: int = 2
    micro_batches: int = 1
    late_check: bool = False
    tokens: int = TOKENS
    fp8: str = "none"

    @property
    def sequences(self) -> int:
        return self.tokens // int(MODELS[self.model]["max_positions"])


def runtime(run: Run) -> RankRuntime:
    model = {**MODELS[run.model], "num_layers": run.layers}
    train = {"global_batch": run.sequences * run.micro_batches, "micro_batch": run.sequences}
    train["late_check"] = run.late_check
    settings = {
        "output": "nowhere",
        "model": model,
        "precision": {"dtype": "bf16", "fp8": run.fp8, "fp8_emulate": run.fp8 != "none"},
        "train": {**train, "sequence_length": model["max_positions"]},
        "data": {"synthetic": True},
    }
    config = from_dict(RunConfig, settings, "budget")
    with registry.meta_as("cuda"):
        return build(config, Mesh.described(MeshShape(), 0), GPTTask(config), torch.device("meta"))


@cache
def step(run: Run) -> Count:
    """What one step of a training run does."""
    parts, length = runtime(run), int(MODELS[run.model]["max_positions"])
    tokens = torch.empty(run.sequences, length, dtype=torch.long, device="meta")
    batch: dict[str, Tensor] = {
        "tokens": tokens,
        "labels": tokens,
        "position_ids": torch.arange(length, device="meta").expand_as(tokens),
        "loss_mask": torch.ones_like(tokens, dtype=torch.bool),
        "sample_index": torch.arange(run.sequences, device="meta"),
    }
    run_step = parts.step.queue if run.late_check else parts.step
    with patch.object(float8_product, "torch_multiplies", lambda device, blocks: True):  # as Hopper does
        return counted(lambda: run_step([batch] * run.micro_batches))


def micro_batch(run: Run) -> Count:
    """One that is not a step's first."""
    return step(run._replace(micro_batches=2)) - step(run)


def of_block(run: Run) -> Count:
    return micro_batch(run._replace(layers=3)) - micro_batch(run)


@pytest.mark.parametrize(("model", "launches", "passes"), [("gpt2", 27, 106.6), ("llama", 26, 120.0)])
def test_a_block(model: str, launches: int, passes: float) -> None:
    """Forward and backward. ``passes``: over an activation ``[s, b, h]``, weights and attention's operands included."""
    count = of_block(Run(model))
    one = 2 * TOKENS * MODELS[model]["hidden_size"]
    assert (count.launches, round(count.bytes / one, 1)) == (launches, passes), count.kernels


@pytest.mark.parametrize(
    ("fp8", "launches", "passes"), [("tensorwise", 90, 173.1), ("rowwise", 78, 173.2), ("blockwise", 70, 153.2)]
)
def test_a_block_in_fp8(fp8: str, launches: int, passes: float) -> None:
    """Of four sequences, in 12 products as in bf16."""
    count = of_block(Run("llama", fp8=fp8))
    one = 2 * TOKENS * MODELS["llama"]["hidden_size"]
    found = count.launches, round(count.bytes / one, 1), count.kernels["_scaled_mm_v2"]
    assert found == (launches, passes, 12), count.kernels


DIFFUSION: dict[str, dict[str, Any]] = {
    "dit": {"hidden_size": 1152, "num_heads": 16, "image_size": 32},
    "joint": {"hidden_size": 1536, "num_heads": 24, "image_size": 32, "condition": "text", "text_tokens": 128,
              "qk_norm": True, "positions": "rope", "activation": "swiglu"},
}  # fmt: skip


def step_of_diffusion(model: str, layers: int, micro_batches: int) -> Count:
    """Micro-batches of 32 images of 256 tokens."""
    settings = {
        "output": "nowhere",
        "data": {"path": "nowhere"},
        "model": {**DIFFUSION[model], "num_layers": layers},
        "precision": {"dtype": "bf16"},
        "train": {"global_batch": 32 * micro_batches, "micro_batch": 32},
    }
    config = from_dict(DiffusionRun, settings, "budget")
    with registry.meta_as("cuda"):
        parts = build(config, Mesh.described(MeshShape(), 0), DiTTask(config), torch.device("meta"))
    images, number = torch.empty(32, 4, 32, 32, device="meta"), torch.empty(32, dtype=torch.int64, device="meta")
    batch = {"images": images, "noise": images, "time": number.float(), "counts": number > 0, "labels": number}
    if config.model.has_text:
        m = config.model
        text = torch.empty(32, m.text_tokens, m.text_size, device="meta")
        batch |= {"text": text, "pooled": torch.empty(32, m.pooled_size, device="meta")}
    return counted(lambda: parts.step([batch] * micro_batches))


@pytest.mark.parametrize(("model", "launches", "passes"), [("dit", 41, 120.4), ("joint", 98, 285.8)])
def test_a_block_of_a_diffusion_transformer(model: str, launches: int, passes: float) -> None:
    """With torch's operators for adaLN a block of DiT-XL/2 takes 64 launches and 148.5 passes."""
    deep, shallow = (step_of_diffusion(model, n, 2) - step_of_diffusion(model, n, 1) for n in (2, 1))
    count, one = deep - shallow, 2 * 32 * 256 * int(DIFFUSION[model]["hidden_size"])
    assert (count.launches, round(count.bytes / one, 1)) == (launches, passes), count.kernels


@pytest.mark.parametrize(("model", "launches", "passes"), [("gpt2", 45, 349.1), ("llama", 39, 104.5)])
def test_a_micro_batch_outside_of_its_blocks(model: str, launches: int, passes: float) -> None:
    """Embedding, last norm and loss. No row of an embedding's gradient is copied in fp32."""
    run = Run(model)
    outside = micro_batch(run)
    for _ in range(run.layers):
        outside -= of_block(run)
    one = 2 * TOKENS * MODELS[model]["hidden_size"]
    assert (outside.launches, round(outside.bytes / one, 1)) == (launches, passes), outside.kernels


@pytest.mark.parametrize(("model", "launches"), [("gpt2", 24), ("llama", 24)])
def test_an_update(model: str, launches: int) -> None:
    """What a step has besides its micro-batches: the norm of the gradients, the update, the parameters it makes."""
    for layers in (2, 3):
        run = Run(model, layers)
        update = step(run) - micro_batch(run)
        assert update.launches == launches and update.kernels["adamw_"] == 2, update.kernels


def calls_of_an_update(layers: int) -> tuple[int, int]:
    """Functions that Python calls from the gradients' norm to the last parameter, and tensors of a Llama so deep."""
    parts = runtime(Run("llama", layers))
    one, calls = torch.ones((), dtype=torch.float64, device="meta"), 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def run() -> None:
        parts.step.begin(one)
        parts.optimizer.start_backward(True)
        parts.optimizer.end_backward()
        parts.step.reduce()
        sys.setprofile(count)
        try:
            parts.step.finish(one, one)
        finally:
            sys.setprofile(None)

    counted(run)  # makes what is made once
    calls = 0
    counted(run)
    return calls, sum(1 for _ in parts.optimizer.reducer.main_grads())


def test_the_host_does_little_for_each_tensor_of_an_update() -> None:
    """Looks at flags. An operator on each tensor would be ten calls and more."""
    (few, tensors), (many, more_tensors) = calls_of_an_update(2), calls_of_an_update(24)
    assert (tensors, more_tensors) == (15, 147)
    assert many - few <= 7 * (more_tensors - tensors), (few, many)


@pytest.mark.parametrize("model", MODELS)
def test_the_host_waits_once_a_step(model: str) -> None:
    assert step(Run(model)).waits == 1 and micro_batch(Run(model)).waits == 0


def test_larger_chunks_of_the_loss_take_no_more_memory() -> None:
    """GPT-2 in micro-batches of 32,768 tokens: 8,192 of them at once, in the memory that 256 MiB of logits, a gradient
    of the table, a product of it and a gradient of the hidden states take. It lacks that of the last MLP's activation,
    which is computed again."""
    run = Run("gpt2", tokens=4 * TOKENS)
    rows, width = MODELS["gpt2"]["vocab_size"], MODELS["gpt2"]["hidden_size"]
    counts: list[Count] = []
    most = most_bytes(lambda: counts.append(step.__wrapped__(run)))
    with patch.object(loss, "GPU_CHUNK_TOKENS", 4096):
        smaller = most_bytes(lambda: counts.append(step.__wrapped__(run)))
    assert [count.kernels["token_losses_"] for count in counts] == [4, 8]
    assert [count.kernels["bias_gelu"] for count in counts] == [run.layers + 1, run.layers]
    without_logits = smaller - 2 * 4096 * rows
    assert most <= without_logits + (256 << 20) + 2 * 4 * rows * width + 2 * run.tokens * width
    activation = 2 * run.tokens * 4 * width
    assert most == without_logits + 2 * 8192 * rows - activation + 12 * 4096  # and numbers of a token


def test_the_host_waits_for_no_step_that_is_checked_late() -> None:
    assert step(Run("gpt2", late_check=True)).waits == 0


@pytest.mark.parametrize(
    ("hidden", "softcap", "tokens", "chunk"),
    [(2048, None, 8192, 8192), (2048, None, 3 * 8192, 8192), (768, None, 4 * 8192, 5632), (2048, 30.0, 8192, 4096)],
)
def test_the_loss_holds_the_logits_of_one_chunk(hidden: int, softcap: float | None, tokens: int, chunk: int) -> None:
    """In half precision, and their gradient in the same place; with a soft cap its slope besides.

    No more than 256 MiB of logits, a gradient of the table and a product of it would take, which it does without.
    """
    vocabulary = 50304
    weight = nn.Parameter(torch.empty(vocabulary, hidden, dtype=torch.bfloat16, device="meta"))
    weight.main_grad = MainGradient("", lambda _: None, lambda _: None)  # type: ignore[attr-defined]
    weight.main_grad.view = torch.empty(vocabulary, hidden, device="meta")  # type: ignore[attr-defined]
    x = torch.empty(tokens, 1, hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels = torch.empty(tokens, 1, dtype=torch.long, device="meta")
    mask, seed = torch.ones_like(labels, dtype=torch.bool), torch.ones((), device="meta")
    logits = Logits(softcap=softcap, seed=seed)
    held = most_bytes(
        lambda: linear_cross_entropy(
            x, weight, labels, mask, vocab_size=vocabulary, logits=logits, tp=Mesh.single().tp
        ).backward(seed)
    )
    own = (1 if softcap is None else 2) * 2 * chunk * vocabulary
    beside = 2 * x.numel() + 64 * labels.numel()  # the gradient of x; numbers of a token
    assert own <= held <= own + beside
    assert held <= (256 << 20) + 2 * 4 * weight.numel() + beside
