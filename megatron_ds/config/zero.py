"""What has to fit together in the ZeRO settings, for any model: pretraining and ``initialize()`` ask the same rules."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ds.config.schema import OffloadConfig, ZeroConfig
from megatron_ds.errors import divisors

_PARTS = ("offload_optimizer", "offload_parameters")


def zero_faults(zero: ZeroConfig, data_size: int) -> Iterator[str]:
    """Why state cannot be sharded and offloaded in this way over ``data_size`` data-parallel ranks, if it cannot.

    A setting that would do nothing counts as a fault: whoever wrote it expects it to do something.
    """
    size = zero.shard_size
    if size is not None and zero.stage == 0:
        yield f"zero.shard_size={size} does nothing: zero.stage=0 shards nothing; use stage 1, 2 or 3"
    elif size is not None and data_size % size:
        yield f"zero.shard_size={size} does not divide dp={data_size}; it may be {divisors(data_size)}"
    if zero.keep_whole and zero.stage < 2:
        yield f"zero.keep_whole does nothing: with zero.stage={zero.stage} gradients are whole anyway; use stage 2 or 3"
    for name in ("prefetch", "persistence_threshold"):
        value = getattr(zero, name)
        if zero.stage < 3 and value != ZeroConfig.model_fields[name].default:
            yield f"zero.{name}={value} does nothing: with zero.stage={zero.stage} parameters stay whole; use stage 3"
    yield from _quantized_faults(zero, data_size)
    if zero.offload_parameters.device != "none" and zero.stage < 3:
        yield (
            f"zero.offload_parameters.device={zero.offload_parameters.device!r} with zero.stage={zero.stage}: "
            "parameters are sharded, and can leave the device, at stage 3 only; use zero.stage=3, or "
            "zero.offload_optimizer for master weights and optimizer state"
        )
    if zero.offload_optimizer.device != "none" and zero.stage == 0:
        yield (
            f"zero.offload_optimizer.device={zero.offload_optimizer.device!r} with zero.stage=0: every rank would "
            "offload all of the state, dp times the same; use zero.stage=1, 2 or 3"
        )
    for part in _PARTS:
        yield from _offload_faults(f"zero.{part}", getattr(zero, part))
    if zero.host_memory_mb is not None and all(getattr(zero, part).device == "none" for part in _PARTS):
        yield (
            f"zero.host_memory_mb={zero.host_memory_mb:g} does nothing: nothing is offloaded; set "
            "zero.offload_optimizer.device or zero.offload_parameters.device"
        )


def _quantized_faults(zero: ZeroConfig, data_size: int) -> Iterator[str]:
    weights, gradients, size = zero.quantized_weights, zero.quantized_gradients, zero.secondary_size
    sharded = min(zero.shard_size or data_size, data_size)
    if weights != "none" and zero.stage < 3:
        yield (
            f"zero.quantized_weights={weights!r} does nothing: with zero.stage={zero.stage} no weights are gathered "
            "before their use; use zero.stage=3"
        )
    if gradients != "none" and zero.stage == 0:
        yield f"zero.quantized_gradients={gradients!r} does nothing: zero.stage=0 scatters no gradients; use 1, 2 or 3"
    if size is not None and zero.stage < 3 and (gradients == "none" or zero.stage == 0):
        yield (
            f"zero.secondary_size={size} does nothing with zero.stage={zero.stage} and zero.quantized_gradients="
            f"{gradients!r}: no weights are gathered again and no gradients are quantised; use zero.stage=3"
        )
    named = [
        f"zero.{name}={value!r}"
        for name, value in (("quantized_weights", weights), ("quantized_gradients", gradients))
        if value != "none"
    ]
    if named and sharded == 1:
        yield f"{', '.join(named)} does nothing: state is sharded over one rank, which sends nothing; use more ranks"
    if zero.quantized_stochastic and gradients == "none":
        yield "zero.quantized_stochastic does nothing with zero.quantized_gradients='none'; use 'int8' or 'int4'"
    if size is not None and zero.shard_size is not None:
        yield f"zero.secondary_size={size} and zero.shard_size={zero.shard_size} both group the ranks; use one"
    elif size is not None and data_size % size:
        legal = ", ".join(str(d) for d in range(2, data_size + 1) if data_size % d == 0)
        yield f"zero.secondary_size={size} does not divide dp={data_size}; use one of {legal or 'no value at all'}"
    if zero.offload_parameters.device != "none" and (weights != "none" or size is not None):
        yield (
            "zero.offload_parameters keeps weights as they are on their way; leave out zero.quantized_weights and "
            "zero.secondary_size"
        )


def _offload_faults(key: str, offload: OffloadConfig) -> Iterator[str]:
    if offload.device == "nvme" and not offload.path:
        yield f"{key}.device='nvme' needs {key}.path, a folder on a local disk of each node, e.g. /local_nvme/swap"
    if offload.device != "nvme" and offload.path:
        yield f"{key}.path={offload.path!r} does nothing with {key}.device={offload.device!r}; use device='nvme'"
    if offload.device == "none":
        for name in ("ratio", "pin_memory"):
            value = getattr(offload, name)
            if value != OffloadConfig.model_fields[name].default:
                yield f"{key}.{name}={value} does nothing with {key}.device='none'; use device='cpu' or 'nvme'"
