"""The one pass over everything in a configuration that has to fit together."""

from __future__ import annotations

import math

from megatron_ds.config.data import data_faults, ramp_faults
from megatron_ds.config.pipeline import pipeline_faults
from megatron_ds.config.schema import RunConfig
from megatron_ds.config.sparse import sparse_faults
from megatron_ds.config.unused import PRETRAINING, unused_faults
from megatron_ds.config.zero import zero_faults
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import MeshShape

MOST_MICRO_BATCHES = 1 << 16
"""Of a step: the schedule lists and checks each."""


def validate(config: RunConfig, world_size: int, needs_data: bool = True) -> MeshShape:
    """The one pass over everything that has to fit together. Returns the mesh; raises ConfigError with all faults.

    ``needs_data``: the run reads samples, so that it must be said where they come from.

    Runs before any process group exists and depends on the configuration and the world size alone, so that every
    rank comes to the same verdict.
    """
    m, mesh, train = config.model, config.mesh, config.train
    shape = MeshShape.for_world(world_size, pp=mesh.pp, cp=mesh.cp, tp=mesh.tp, dp=mesh.dp)
    faults: list[str] = []

    def check(fine: bool, message: str) -> None:
        if not fine:
            faults.append(message)

    check(mesh.cp == 1, f"mesh.cp={mesh.cp}: context parallelism is not built yet; use mesh.cp=1")
    check(
        m.num_heads % m.groups == 0,
        f"model.num_heads={m.num_heads} is not a multiple of model.kv_heads={m.groups}; "
        f"kv_heads may be {divisors(m.num_heads)}",
    )
    check(
        m.head_dim is not None or m.hidden_size % m.num_heads == 0,
        f"model.hidden_size={m.hidden_size} is not a multiple of model.num_heads={m.num_heads}; "
        f"use {_around(m.hidden_size, m.num_heads)}, or set model.head_dim",
    )
    check(
        m.groups % mesh.tp == 0,
        f"model.{'num_heads' if m.kv_heads is None else 'kv_heads'}={m.groups} cannot be split over "
        f"mesh.tp={mesh.tp}; tp may be {divisors(m.groups)}",
    )
    check(
        m.ffn_size % mesh.tp == 0,
        f"model.ffn_hidden_size={m.ffn_size} cannot be split over mesh.tp={mesh.tp}; "
        f"use {_around(m.ffn_size, mesh.tp)}",
    )
    check(
        m.padded_vocab % mesh.tp == 0,
        f"the vocabulary padded to {m.padded_vocab} (model.vocab_size={m.vocab_size}, "
        f"model.vocab_multiple={m.vocab_multiple}) cannot be split over mesh.tp={mesh.tp}; "
        f"use model.vocab_multiple={math.lcm(m.vocab_multiple, mesh.tp)}",
    )
    check(
        m.position != "rope" or m.head_size % 2 == 0,
        f"rotary positions need an even head_dim, not {m.head_size}",
    )
    check(
        m.causal or m.position != "alibi",
        "model.position='alibi' with model.family='bert': ALiBi's bias is for tokens that look back; use 'learned', "
        "'rope' or 'none'",
    )
    check(
        m.causal or not (config.data.conversations or config.data.fim.rate),
        "data.conversations and data.fim.rate are for model.family='gpt': a BERT predicts masked tokens of texts",
    )
    if m.rope_scaling is not None:
        needed = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        check(
            needed <= set(m.rope_scaling),
            f"model.rope_scaling={m.rope_scaling} lacks {sorted(needed - set(m.rope_scaling))}",
        )
    check(
        m.position != "learned" or train.sequence_length <= m.max_positions,
        f"train.sequence_length={train.sequence_length} is longer than model.max_positions={m.max_positions}; "
        "raise max_positions or shorten the sequence",
    )
    check(
        not (mesh.sequence_parallel and mesh.tp > 1) or train.sequence_length % mesh.tp == 0,
        f"train.sequence_length={train.sequence_length} cannot be split over mesh.tp={mesh.tp} for sequence "
        f"parallelism; use {_around(train.sequence_length, mesh.tp)}, or --mesh.no-sequence-parallel",
    )
    portion = train.micro_batch * shape.dp
    check(
        train.global_batch % portion == 0,
        f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch={train.micro_batch} x "
        f"dp={shape.dp} = {portion} (dp is world_size={world_size} / model-parallel {world_size // shape.dp}); "
        f"use {_around(train.global_batch, portion)}",
    )
    check(
        train.global_batch // portion <= MOST_MICRO_BATCHES,
        f"train.global_batch={train.global_batch} is {train.global_batch // portion} micro-batches a replica and step, "
        f"of which there may be {MOST_MICRO_BATCHES}; raise train.micro_batch",
    )
    check(
        config.optimizer.warmup_steps <= (config.optimizer.decay_steps or train.steps),
        f"optimizer.warmup_steps={config.optimizer.warmup_steps} is more than the "
        f"{config.optimizer.decay_steps or train.steps} steps of the schedule",
    )
    check(
        config.optimizer.min_lr <= config.optimizer.lr,
        f"optimizer.min_lr={config.optimizer.min_lr} is above optimizer.lr={config.optimizer.lr}",
    )
    precision = config.precision
    check(
        precision.min_loss_scale <= precision.initial_loss_scale,
        f"precision.initial_loss_scale={precision.initial_loss_scale:g} is below "
        f"precision.min_loss_scale={precision.min_loss_scale:g}",
    )
    faults += pipeline_faults(config)
    faults += unused_faults(config, PRETRAINING)
    faults += data_faults(config, needs_data)
    faults += ramp_faults(config, portion)
    faults += sparse_faults(config)
    faults += zero_faults(config.zero, shape.dp)
    if faults:
        raise ConfigError("\n".join(faults) if len(faults) == 1 else "".join(f"\n  - {fault}" for fault in faults))
    return shape


def divisors(number: int) -> str:
    """``1, 2, 4 or 8``: what may divide ``number``, for an error message."""
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]


def _around(number: int, step: int) -> str:
    below, above = number // step * step, -(-number // step) * step
    return f"{below} or {above}" if below else str(above)
