"""Every setting of a model or an optimizer that is accepted changes what is computed, whatever the others are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from parity_run import Samples, train
from test_unused_settings import annotation, keys
from torch import nn

from megatron_ds.config import RunConfig, from_dict, validate
from megatron_ds.config.diffusion import DiffusionRun
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Mesh
from megatron_ds.models.dit_task import DiTTask
from megatron_ds.models.families import task_of
from megatron_ds.optim.learning_rate import learning_rate
from megatron_ds.pipeline.stage import StageSpan
from megatron_ds.shard import spec_of

Sections = dict[str, Any]
LENGTH = 128
BASE: Sections = {
    "model": {
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 4,
        "ffn_hidden_size": 24,
        "vocab_size": 50,
        "vocab_multiple": 16,
        "max_positions": LENGTH,
        "init_std": 0.2,
    },
    "precision": {"dtype": "fp64"},
    "data": {"synthetic": True},
    "train": {"steps": 5, "global_batch": 2, "micro_batch": 1, "sequence_length": LENGTH},
}
SPARSE = {"block": 16, "num_sliding_window_blocks": 3}
MODELS: dict[str, Sections] = {
    "gpt2": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
    "llama": {
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tied_embeddings": False,
        "kv_heads": 2,
    },
    "bert": {"family": "bert", "embedding_norm": True, "token_types": 2},
    "modernbert": {"family": "bert", "position": "rope", "norm_position": "pre", "window": 8, "first_norm": False},
    "gemma": {
        "position": "rope",
        "window": 8,
        "attention_pattern": ("window", "full"),
        "qk_norm": True,
        "norm_position": "sandwich",
        "norm": "rmsnorm",
        "attention_softcap": 3.0,
        "window_rope_theta": 100.0,
    },
    "falcon": {"position": "alibi", "residual": "parallel_one_norm", "kv_heads": 1},
    "olmo": {"position": "rope", "norm_position": "output", "qk_norm": True, "qk_norm_over": "projection"},
    "yarn": {
        "position": "rope",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        "norm_position": "post",
        "residual": "sequential",
    },
    "no positions": {"position": "none", "residual": "parallel", "window": 8},
    "bigbird": {"attention": {"sparse": {**SPARSE, "mode": "bigbird"}}},
    "variable": {
        "attention": {"sparse": {"block": 16, "mode": "variable", "num_random_blocks": 1}},
        "position": "none",
    },
}
# Of another kind than a number, a switch or one of several names; or a number that has to be another one.
VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_size": (32,),
    "num_heads": (2, 8),
    "kv_heads": (2,),
    "sequence_length": (64,),
    "attention_pattern": (("full", "window"), ("full",)),
    "rope_scaling": ({"rope_type": "linear", "factor": 2.0},),
    "local_window_blocks": ((2,),),
    "global_block_indices": ((2,),),
    "global_block_end_indices": ((3,),),
    "num_sliding_window_blocks": (5,),
    "lr": (0.01,),
    "ema_decay": (0.01,),
}
# The first is what an export states where there is no table of positions; a mode of two blocks is dense attention.
LEFT_OUT = {"max_positions", "mode"}


def others(key: str, now: Any) -> tuple[Any, ...]:
    """Values of another meaning than ``now``, as far as the type says which there are."""
    name, kinds = key.split(".")[-1], (annotation(RunConfig, key), *get_args(annotation(RunConfig, key)))
    if name in VALUES:
        return VALUES[name]
    if bool in kinds:
        return tuple(value for value in (True, False) if value != now)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return tuple(value for value in choices if value != now)
    if float in kinds:
        return (now / 2 if now else 0.25,)
    assert int in kinds, f"what other values {key} has is to be said in VALUES"
    return ((now or 1) + 1,)


def with_value(sections: Sections, key: str, value: Any) -> Sections:
    first, *rest = key.split(".")
    return {**sections, first: with_value(sections.get(first, {}), ".".join(rest), value) if rest else value}


def accepted(sections: Sections) -> RunConfig | None:
    try:
        config = from_dict(RunConfig, sections, "test")
        validate(config, 1)
    except ConfigError:
        return None
    return config


def computed(config: RunConfig) -> tuple[Any, ...]:
    """Of the first micro-batch, in training: the loss, and before it the parameters' names, shapes and sums."""
    task = task_of(config)
    span = StageSpan(0, config.model.num_layers)
    stage: nn.Module = task.make_stage(span, Mesh.single(), torch.device("cpu"), torch.float64)
    stage.initialize(config.seed)  # type: ignore[operator]
    rows = Samples(config.train.sequence_length, False, 50).rows([0, 1])
    batch = {name: torch.from_numpy(values) for name, values in rows.items()}
    batch["token_type_ids"], batch["sample_index"] = batch["tokens"] % 2, torch.arange(2)
    sums = [(name, tuple(p.shape), float(p.detach().sum())) for name, p in stage.named_parameters()]
    with torch.no_grad():
        return sums, float(stage(batch))


def without_effect(base: Sections, section: str, fingerprint: Any) -> Iterator[str]:
    config = accepted(base)
    assert config is not None
    now, tried = fingerprint(config), 0
    resolved = {**config.model.resolved, **config.optimizer.model_dump()}
    for key in (key for key in keys(RunConfig) if key.startswith(f"{section}.")):
        *path, name = key.split(".")
        value: Any = config
        for part in (*path, name):
            value = getattr(value, part)
        value = resolved.get(name, value) if len(path) == 1 and value is None else value
        for other in () if name in LEFT_OUT else others(key, value):
            made = accepted(with_value(base, key, other))
            if made is not None and other != value:
                tried += 1
                if fingerprint(made) == now:
                    yield f"{key}={other!r} (it is {value!r})"
    assert tried > 10


@pytest.mark.parametrize("name", MODELS)
def test_every_accepted_setting_of_a_model_changes_its_first_loss_or_its_parameters(name: str) -> None:
    base = {**BASE, "model": {**BASE["model"], **MODELS[name]}}
    assert list(without_effect(base, "model", computed)) == []


OPTIMIZERS: dict[str, Sections] = {
    "adamw": {},
    "sgd": {"name": "sgd", "schedule": "constant", "clip_norm": 0.5, "weight_decay": 0.1},
    "muon": {"name": "muon", "schedule": "wsd", "ema_decay": 0.5, "min_lr": 1e-3, "warmup_steps": 2},
    "muon by heads": {"name": "muon", "muon_heads": True},
    "muon in double": {"name": "muon", "muon_dtype": "fp32", "muon_adjust": "original", "muon_nesterov": False},
    "linear": {"schedule": "linear", "decay_steps": 20, "ema_decay": 0.9, "ema_warmup": False},
    "inverse root": {"schedule": "inverse_sqrt", "warmup_steps": 3, "momentum": 0.0},
}


def optimized(config: RunConfig) -> tuple[Any, ...]:
    """The learning rates, and the parameters and their averages after the first steps."""
    rates = [learning_rate(config.optimizer, step, config.train.steps) for step in range(1, config.train.steps)]
    outcome = train(config, Mesh.single())
    return rates, [part.values.tobytes() for part in (*outcome.parameters, *outcome.averages)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_accepted_setting_of_an_optimizer_changes_its_updates(name: str) -> None:
    small = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 8, "init_std": 0.2}
    train_section = {**BASE["train"], "sequence_length": 8, "steps": 40}
    base = {**BASE, "model": {**BASE["model"], **small}, "train": train_section}
    base["optimizer"] = {"lr": 0.02, **OPTIMIZERS[name]}
    assert list(without_effect(base, "optimizer", optimized)) == []


# Together these have every kind of parameter that there is.
FAMILIES: list[tuple[type[RunConfig | DiffusionRun], dict[str, Any]]] = [
    (RunConfig, {}),
    (RunConfig, {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "kv_heads": 1}),
    (RunConfig, {"position": "alibi", "embedding_norm": True, "tied_embeddings": False, "head_bias": True}),
    (RunConfig, {"family": "bert", "token_types": 2, "embedding_norm": True, "sentence_head": True}),
    (DiffusionRun, {"learned_variance": True, "qk_norm": True}),
    (DiffusionRun, {"condition": "text", "activation": "swiglu"}),
]


@pytest.mark.parametrize(("kind", "model"), FAMILIES, ids=str)
def test_matrices_and_tables_decay_and_neither_biases_nor_norms_do(kind: Any, model: dict[str, Any]) -> None:
    config = from_dict(kind, {"model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, **model}}, "test")
    task: Any = DiTTask(config) if kind is DiffusionRun else task_of(config)
    stage = task.make_stage(StageSpan(0, 1), Mesh.single(), torch.device("meta"), torch.float32)
    specs = [spec_of(parameter) for parameter in stage.parameters()]
    assert len(specs) > 10
    for spec in specs:
        owner, _, last = spec.name.rpartition(".")
        assert spec.weight_decay == (last == "weight" and not owner.endswith("norm")), spec.name
