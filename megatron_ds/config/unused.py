"""Settings that would do nothing, which is a fault: whoever made one expects it to do something.

One table for pretraining and ``initialize()``. A row names settings, when they are in use, and what to do where they
are not; a setting that has its default was not made. Not in the table is what only the number of ranks leaves without
effect (``mesh.sequence_parallel`` on one rank, say): the same file is meant for many sizes. Nor is
``precision.fp8_from_masters``, which was off by default once, so that the files of older runs have it. ZeRO's own rows
are in `zero.py`, those of sparse attention in `sparse.py`, where the modes themselves say what they take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Unused:
    """``keys``: dotted. ``used``: whether they are in use in a configuration. ``instead``: formatted with it as c."""

    keys: tuple[str, ...]
    used: Callable[[Any], bool]
    instead: str


def _scales_loss(c: Any) -> bool:
    # The engine may leave a model in the dtype that it came in.
    return c.precision.dtype == "fp16" or getattr(c, "keeps_dtype", False)


COMMON = (
    Unused(
        ("optimizer.momentum",),
        lambda c: c.optimizer.name == "sgd",
        "optimizer.name={c.optimizer.name!r} has optimizer.beta1 for it; use that, or optimizer.name='sgd'",
    ),
    Unused(
        ("optimizer.beta1", "optimizer.beta2", "optimizer.eps"),
        lambda c: c.optimizer.name != "sgd",
        "optimizer.name={c.optimizer.name!r} has optimizer.momentum alone; use that, or optimizer.name='adamw'",
    ),
    Unused(
        tuple(f"optimizer.muon_{name}" for name in ("momentum", "nesterov", "steps", "dtype", "heads", "adjust")),
        lambda c: c.optimizer.name == "muon",
        "optimizer.name={c.optimizer.name!r} has nothing of Muon's; use optimizer.name='muon'",
    ),
    Unused(
        ("optimizer.ema_warmup",), lambda c: c.optimizer.ema_decay > 0, "optimizer.ema_decay=0 keeps no average; set it"
    ),
    Unused(
        ("optimizer.min_lr",),
        lambda c: c.optimizer.schedule != "constant",
        "optimizer.schedule='constant' never leaves optimizer.lr; use another schedule",
    ),
    Unused(
        ("optimizer.decay_steps",),
        lambda c: c.optimizer.schedule in ("cosine", "linear", "wsd"),
        "optimizer.schedule={c.optimizer.schedule!r} knows no end; use 'cosine', 'linear' or 'wsd'",
    ),
    Unused(
        ("optimizer.wsd_decay_fraction",),
        lambda c: c.optimizer.schedule == "wsd",
        "optimizer.schedule={c.optimizer.schedule!r} has no stable part; use 'wsd'",
    ),
    Unused(
        ("precision.loss_scale",),
        _scales_loss,
        "precision.dtype={c.precision.dtype!r} needs no loss scale; use precision.dtype='fp16'",
    ),
    Unused(
        (
            "precision.initial_loss_scale",
            "precision.loss_scale_window",
            "precision.loss_scale_wait",
            "precision.loss_scale_hysteresis",
            "precision.min_loss_scale",
        ),
        lambda c: _scales_loss(c) and c.precision.loss_scale is None,
        "there is a dynamic loss scale with precision.dtype='fp16' and without precision.loss_scale alone",
    ),
    Unused(
        (
            "precision.fp8_gradients",
            "precision.fp8_weight_gradient",
            "precision.fp8_power_of_two",
            "precision.fp8_min_features",
            "precision.fp8_exclude",
            "precision.fp8_emulate",
        ),
        lambda c: c.precision.fp8 != "none",
        "precision.fp8='none' has no products in FP8; use precision.fp8='blockwise' or another",
    ),
    Unused(
        ("precision.fp8_block",),
        lambda c: c.precision.fp8 == "blockwise",
        "precision.fp8={c.precision.fp8!r} has no blocks; use precision.fp8='blockwise'",
    ),
)

_DATA = (
    "data.prefix",
    "data.blend",
    "data.train_blend",
    "data.valid_blend",
    "data.test_blend",
    "data.split",
    "data.document_masking",
    "data.conversations",
    "data.fim.rate",
    "data.cache_dir",
)

TEXT = (
    Unused(_DATA, lambda c: not c.data.synthetic, "data.synthetic makes up the tokens; use --data.no-synthetic"),
    Unused(
        ("data.split",),
        lambda c: not (c.data.train_blend or c.data.valid_blend or c.data.test_blend),
        "data.train_blend and its like are whole datasets of each split; leave it out, or use data.blend",
    ),
    Unused(
        ("data.fim.spm_rate", "data.fim.tokens"),
        lambda c: c.data.fim.rate > 0,
        "data.fim.rate=0 rearranges nothing; set data.fim.rate",
    ),
    Unused(
        ("data.mask_token", "data.mask_probability"),
        lambda c: not c.model.causal,
        "model.family='gpt' masks no tokens; use model.family='bert'",
    ),
    Unused(
        ("data.document_masking",),
        lambda c: not c.data.conversations,
        "data.conversations keeps the conversations of a sequence apart anyway; leave it out",
    ),
    Unused(
        (
            "model.rope_theta",
            "model.rope_scaling",
            "model.rotary_dim",
            "model.rotary_interleaved",
            "model.window_rope_theta",
        ),
        lambda c: c.model.position == "rope",
        "model.position={c.model.position!r} has no rotary embeddings; use model.position='rope'",
    ),
    Unused(
        ("model.alibi",),
        lambda c: c.model.position == "alibi",
        "model.position={c.model.position!r} has no such biases; use model.position='alibi'",
    ),
    Unused(
        ("model.position_offset",),
        lambda c: c.model.position == "learned",
        "model.position={c.model.position!r} has no table of positions; use model.position='learned'",
    ),
    Unused(
        ("model.attention_pattern", "model.window_rope_theta"),
        lambda c: c.model.window is not None,
        "no layer has a window; set model.window",
    ),
    Unused(
        ("model.window",),
        lambda c: any(c.model.has_window(i) for i in range(len(c.model.attention_pattern))),
        "model.attention_pattern gives it to no layer; have 'window' in it",
    ),
    Unused(
        ("model.sentence_head",),
        lambda c: not c.model.causal,
        "model.family='gpt' scores no pairs of sentences; use model.family='bert'",
    ),
    Unused(
        ("model.qk_norm_over",),
        lambda c: c.model.qk_norm,
        "queries and keys have no norm; set model.qk_norm",
    ),
    Unused(
        ("model.norm_bias",),
        lambda c: c.model.norm == "layernorm" or c.model.embedding_norm,
        "model.norm='rmsnorm' never has a bias; use model.norm='layernorm'",
    ),
    Unused(
        ("model.first_norm",),
        lambda c: c.model.resolved["norm_position"] in ("pre", "sandwich"),
        "with model.norm_position={c.model.resolved[norm_position]!r} no block begins with a norm; use 'pre'",
    ),
)

PRETRAINING = (
    *COMMON,
    Unused(
        ("data.changed",),
        lambda c: c.checkpoint.resume or c.checkpoint.resume_from is not None,
        "no run is resumed; use --checkpoint.resume",
    ),
    Unused(
        ("pipeline.split",),
        lambda c: c.pipeline.layers_per_stage is None,
        "pipeline.layers_per_stage says how the layers are split; keep one of them",
    ),
    Unused(
        ("recompute.every",),
        lambda c: c.recompute.mode == "every_n",
        "recompute.mode={c.recompute.mode!r} counts no blocks; use recompute.mode='every_n'",
    ),
    Unused(
        ("train.eval_batches",),
        lambda c: c.train.eval_every > 0,
        "train.eval_every=0 evaluates never; set train.eval_every, or leave train.eval_batches at 8, its default",
    ),
    Unused(
        ("checkpoint.keep_last",),
        lambda c: c.checkpoint.save_every > 0 or c.checkpoint.save_at_end,
        "no checkpoint is ever written; set checkpoint.save_every",
    ),
)

ENGINE = (
    *COMMON,
    Unused(
        ("log.breakdown",),
        lambda c: c.log.every > 0,
        "log.every=0 prints no line that it could be in; set log.every",
    ),
)


def unused_faults(config: BaseModel, table: Sequence[Unused]) -> Iterator[str]:
    """A sentence on each setting that was made and does nothing."""
    for row in table:
        if row.used(config):
            continue
        for key in row.keys:
            *path, name = key.split(".")
            section: Any = config
            for part in path:
                section = getattr(section, part)
            value = getattr(section, name)
            if value != type(section).model_fields[name].get_default(call_default_factory=True):
                yield f"{key}={value!r} does nothing: {row.instead.format(c=config)}"
