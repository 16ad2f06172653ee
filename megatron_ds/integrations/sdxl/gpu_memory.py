"""What fine-tuning SDXL takes on 1 to 8 GPUs at each ZeRO stage, and on which cards it fits. Nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.config.engine import EngineConfig
from megatron_ds.engine.model_layout import layout_of
from megatron_ds.kernels.autograd import first_derivative_only

GPUS = range(1, 9)
STAGES = range(4)
CARDS = (24, 40, 80)
_AVERAGE = " with --use_ema"
LEFT_FREE = 2.0  # GiB of a card for CUDA, its libraries and what the allocator cannot use; assumed, not measured


class _FlashAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: on the meta device torch takes the kernel that keeps whole score matrices."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("what a forward pass keeps is counted; no backward pass follows")


@contextmanager
def _flash_attention() -> Iterator[None]:
    functional = torch.nn.functional
    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v, **_: _FlashAttention.apply(q, k, v)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


class _Saved:
    """The memory of what autograd keeps of the operations inside :meth:`counting`, each once."""

    def __init__(self, besides: set[int]):
        self._besides = besides
        self._found: dict[int, Any] = {}

    def add(self, tensor: Any) -> Any:
        if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._besides:
            self._found[storage._cdata] = storage
        return tensor

    def counting(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(int(storage.nbytes()) for storage in self._found.values())


def saved_bytes(unet: Any, inputs: Callable[[], Any], checkpointing: bool) -> tuple[int, int]:
    """What autograd keeps of a forward pass of a model of `diffusers`, and what exists besides while a part of it is
    computed again: counted in one forward pass.

    Args:
        inputs: calls the model.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept, most = _Saved(parameters), 0

    def part(module: nn.Module, *arguments: Any) -> Any:
        nonlocal most
        for argument in arguments:
            kept.add(argument)
        inside = _Saved(parameters)
        with inside.counting():
            output = module(*arguments)
        most = max(most, inside.bytes)
        return output

    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing(part)
    else:
        unet.disable_gradient_checkpointing()
    with _flash_attention(), kept.counting():
        inputs()
    unet.disable_gradient_checkpointing()
    return kept.bytes, most


def activation_bytes(unet: Any, batch: int, resolution: int, checkpointing: bool) -> int:
    """Of a micro-batch, estimated: what is kept, with the largest part that is computed again. Temporary tensors of
    single operations come on top. The model is on the meta device, in the dtype in which it computes."""
    c, dtype = unet.config, unet.dtype

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(batch, *shape, dtype=kind, device="meta")

    # Of VAEs of diffusers for SDXL: 8 pixels a latent. Of CLIP: 77 tokens.
    latents = empty(c.in_channels, resolution // 8, resolution // 8)
    pooled = empty(c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim)
    sizes = {"text_embeds": pooled, "time_ids": empty(6, kind=torch.float32)}
    time, text = empty(kind=torch.float64), empty(77, c.cross_attention_dim)
    kept, most = saved_bytes(unet, lambda: unet(latents, time, text, added_cond_kwargs=sizes), checkpointing)
    return kept + most


def memory_table(unet: nn.Module, settings: dict[str, Any], activations: int, what: str) -> str:
    """Exact bytes of a rank by stage and number of GPUs, with and without a moving average; and which cards they fit.

    Args:
        settings: of the engine, but for stage and average.
        activations: estimated bytes of a micro-batch, of ``what``.
    """
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    every = sum(p.numel() for p in unet.parameters())
    exact: dict[str, list[int]] = {}
    needed: dict[str, list[float]] = {}
    for average in (False, True):
        for ranks in GPUS:
            name = _gpus(ranks) + _AVERAGE * average
            found = [_bytes(unet, settings, stage, 0.9999 * average, ranks) for stage in STAGES]
            exact[name] = [held for held, _ in found]
            needed[name] = [(held + transient + activations) / 2**30 for held, transient in found]
    stages = "".join(f"{f'ZeRO-{stage}':>18}" for stage in STAGES)
    lines = [
        f"{every:,} parameters, {trained:,} of them trained; master weights, gradients and AdamW's moments in fp32",
        "",
        f"{'bytes a rank holds, exactly':<28}{stages}",
        *(f"{name:<28}" + "".join(f"{size:>18,}" for size in sizes) for name, sizes in exact.items()),
        "",
        f"With activations, estimated at {activations / 2**30:.2f} GiB ({what}), and what is whole for a moment at "
        "stages 2 and 3:",
        "",
        f"{'GiB a rank needs':<28}{stages}",
        *(f"{name:<28}" + "".join(f"{size:>18.1f}" for size in sizes) for name, sizes in needed.items()),
        "",
        f"{f'fits ({LEFT_FREE:.0f} GiB left free)':<28}" + "".join(f"{f'{card} GB':>18}" for card in CARDS),
    ]
    for stage in STAGES:
        for more in ("", _AVERAGE):
            sizes = [needed[_gpus(ranks) + more][stage] for ranks in GPUS]
            lines.append(f"{f'ZeRO-{stage}{more}':<28}" + "".join(f"{_fits(sizes, card):>18}" for card in CARDS))
    return "\n".join(lines)


def _bytes(unet: nn.Module, settings: dict[str, Any], stage: int, average: float, ranks: int) -> tuple[int, int]:
    """What a rank holds between steps, and what is whole for a moment."""
    optimizer = {**settings.get("optimizer", {}), "ema_decay": average}
    zero = {**settings.get("zero", {}), "stage": stage}
    config = EngineConfig.model_validate({**settings, "optimizer": optimizer, "zero": zero})
    layout, micro_batches = layout_of(unet, config, ranks), config.accumulation or 1
    held = layout.bytes(micro_batches).total("device")
    return held, sum(layout.transient_bytes(micro_batches).values())


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number > 1)}"


def _fits(sizes: Sequence[float], card: int) -> str:
    fitting = [ranks for ranks, size in zip(GPUS, sizes) if size <= card - LEFT_FREE]
    if not fitting:
        return f"not on {GPUS[-1]}"
    return f"from {_gpus(fitting[0])}"
