"""A setting that would do nothing is a fault, and every number and text is of its type, finite and in range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from test_config import SMALL, config

from megatron_ds.config import RunConfig, from_dict, parse, validate
from megatron_ds.config.engine import EngineConfig, validate_engine
from megatron_ds.config.unused import ENGINE, PRETRAINING, TEXT, Unused, unused_faults
from megatron_ds.errors import ConfigError

Sections = dict[str, Any]

ROWS = (*PRETRAINING, *TEXT)

# For each row of the tables, in its order: settings beside which each of its keys does nothing, and does something.
REAL = {"synthetic": False, "prefix": "corpus"}
FIM = {"rate": 0.5, "tokens": ("<P>", "<M>", "<S>")}
WINDOW = {"window": 4, "attention_pattern": ("window", "full")}
OFF_AND_ON: list[tuple[Sections, Sections]] = [
    ({}, {"optimizer": {"name": "sgd"}}),
    ({"optimizer": {"name": "sgd"}}, {}),
    ({}, {"optimizer": {"name": "muon"}}),
    ({}, {"optimizer": {"ema_decay": 0.9}}),
    ({"optimizer": {"schedule": "constant"}}, {}),
    ({"optimizer": {"schedule": "inverse_sqrt"}}, {"optimizer": {"schedule": "wsd"}}),
    ({}, {"optimizer": {"schedule": "wsd"}}),
    ({"precision": {"dtype": "bf16"}}, {"precision": {"dtype": "fp16"}}),
    ({"precision": {"dtype": "fp16", "loss_scale": 4.0}}, {"precision": {"dtype": "fp16"}}),
    ({}, {"precision": {"fp8": "tensorwise"}}),
    ({"precision": {"fp8": "rowwise"}}, {"precision": {"fp8": "blockwise"}}),
    ({}, {"checkpoint": {"resume": True}}),
    ({"pipeline": {"layers_per_stage": (6,)}}, {}),
    ({}, {"recompute": {"mode": "every_n"}}),
    ({}, {"train": {"eval_every": 10}}),
    ({"checkpoint": {"save_at_end": False}}, {}),
    ({}, {"data": REAL}),
    ({"data": {"synthetic": False, "train_blend": ((1.0, "a"),)}}, {"data": REAL}),
    ({}, {"data": {**REAL, "tokenizer": "t", "fim": FIM}}),
    ({}, {"model": {"family": "bert"}}),
    ({"data": {**REAL, "conversations": True}}, {"data": REAL}),
    ({"model": {"position": "learned"}}, {"model": {"position": "rope", **WINDOW}}),
    ({"model": {"position": "rope"}}, {"model": {"position": "alibi"}}),
    ({"model": {"position": "rope"}}, {"model": {"position": "learned"}}),
    ({"model": {"position": "rope"}}, {"model": {"position": "rope", **WINDOW}}),
    ({"model": {"attention_pattern": ("full",)}}, {}),
    ({}, {"model": {"family": "bert"}}),
    ({}, {"model": {"qk_norm": True}}),
    ({"model": {"norm": "rmsnorm"}}, {}),
    ({"model": {"norm_position": "output"}}, {}),
]

# Another legal value than the default, where the one made from the default is none.
VALUES: dict[str, Any] = {
    "data.blend": ((1.0, "b"),),
    "data.train_blend": ((1.0, "b"),),
    "data.valid_blend": ((1.0, "b"),),
    "data.test_blend": ((1.0, "b"),),
    "data.fim.tokens": ("<A>", "<B>", "<C>"),
    "data.changed": "accept",
    "pipeline.split": "cost",
    "optimizer.muon_dtype": "fp32",
    "optimizer.muon_adjust": "original",
    "precision.fp8_gradients": "e4m3",
    "precision.fp8_exclude": ("a",),
    "model.qk_norm_over": "projection",
    "model.alibi": "rounded",
    "model.attention_pattern": ("full", "window"),
    "model.rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def changed(key: str, base: Sections) -> Sections:
    """``base`` with another value than the default at ``key``."""
    *path, name = key.split(".")
    section: type[BaseModel] = RunConfig
    for part in path:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    default = section.model_fields[name].default
    if key in VALUES:
        value = VALUES[key]
    elif isinstance(default, bool):
        value = not default
    elif isinstance(default, int | float):
        value = default / 2 if isinstance(default, float) and default else default + (0.25 if default == 0.0 else 1)
    else:
        value = "1,1" if name == "split" else "x" if str in get_args(section.model_fields[name].annotation) else 2
    if isinstance(default, int) and not isinstance(default, bool):
        value = int(default) + 1
    new: Sections = {name: {**values} for name, values in base.items()}
    place = new
    for part in path:
        place[part] = dict(place.get(part, {}))
        place = place[part]
    place[name] = value
    return new


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_each_setting_is_a_fault_where_it_does_nothing_and_none_where_it_does(row: int) -> None:
    assert len(OFF_AND_ON) == len(ROWS)
    off, on = OFF_AND_ON[row]
    for key in ROWS[row].keys:
        with pytest.raises(ConfigError, match=rf"{key}=.* does nothing: .*[a-z]+\.[a-z_]+|no-synthetic"):
            validate(config(**changed(key, off)), 1)
        used = config(**changed(key, on))
        assert not [fault for fault in unused_faults(used, ROWS) if fault.startswith(key)]
    # And what is not made is no fault.
    assert not [f for f in unused_faults(config(**off), ROWS) if f.startswith(ROWS[row].keys)]


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize(("table", "section"), [(ROWS, RunConfig), (ENGINE, EngineConfig)])
def test_the_table_names_settings_that_exist(table: tuple[Unused, ...], section: type[BaseModel]) -> None:
    assert {key for row in table for key in row.keys} <= set(keys(section))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum=0.9 does nothing: optimizer.name='adamw' has"),
        ({"optimizer": {"min_lr": 1e-5}}, "optimizer.min_lr=1e-05 does nothing: optimizer.schedule='constant'"),
        ({"log": {"breakdown": True}}, "log.breakdown=True does nothing: log.every=0"),
        (
            {"precision": {"dtype": "bf16", "min_loss_scale": 2.0}},
            "precision.min_loss_scale=2.0 does nothing: there is a dynamic loss scale",
        ),
    ],
)
def test_the_engine_has_the_same_rules(values: Sections, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate_engine(from_dict(EngineConfig, values, "test"), 1)
    assert str(refused.value).startswith(message)


def test_an_engine_that_keeps_the_models_dtype_may_scale_its_loss() -> None:
    validate_engine(from_dict(EngineConfig, {"precision": {"loss_scale": 4.0}}, "test"), 1)


# --- numbers and texts ------------------------------------------------------------------------------------------


def numbers() -> list[tuple[type[BaseModel], str]]:
    found = []
    for section in (RunConfig, EngineConfig):
        for key in keys(section):
            kind = annotation(section, key)
            if {int, float} & {kind, *get_args(kind)}:
                found.append((section, key))
    return found


def annotation(section: type[BaseModel], key: str) -> Any:
    *path, name = key.split(".")
    for part in path:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    return section.model_fields[name].annotation


def nested(key: str, value: Any) -> Sections:
    for part in reversed(key.split(".")):
        value = {part: value}
    result: Sections = value
    return result


def test_no_number_is_infinite_true_text_or_beyond_counting() -> None:
    assert len(numbers()) > 80
    for section, key in numbers():
        for bad in (math.inf, -math.inf, math.nan, True, "3", 1 << 70, -(1 << 70)):
            if bad == "3" and key == "checkpoint.resume_from":
                continue  # may be a path
            with pytest.raises(ConfigError, match=f"{key}[. ].*Input should be"):
                from_dict(section, nested(key, bad), "test")


def test_no_text_is_empty_or_cut_by_a_nul() -> None:
    texts = [
        key for key in keys(RunConfig) if str in (annotation(RunConfig, key), *get_args(annotation(RunConfig, key)))
    ]
    assert len(texts) > 7
    for key in texts:
        for bad in ("", "a\0b"):
            with pytest.raises(ConfigError, match=f"{key} = .*Input should not"):
                from_dict(RunConfig, nested(key, bad), "test")


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"steps": True}, "train.steps = True: Input should be a valid integer"),
        ("train", {"steps": 3.0}, "train.steps = 3.0: Input should be a valid integer"),
        ("zero", {"stage": True}, "zero.stage = True: Input should be 0 or 1 or 2 or 3"),
        ("mesh", {"sequence_parallel": 1}, "mesh.sequence_parallel = 1: Input should be a valid boolean"),
        ("log", {"record_steps": [2, -3]}, "log.record_steps.1 = -3: Input should be greater than 0"),
        ("train", {"batch_ramp": [2, 0, 10]}, "train.batch_ramp.1 = 0: Input should be greater than 0"),
        ("pipeline", {"layers_per_stage": [3, 0]}, "pipeline.layers_per_stage.1 = 0: Input should be greater than 0"),
        ("data", {"blend": [[math.inf, "a"]]}, "Input should be a finite number"),
        ("model", {"rope_scaling": {"factor": math.nan}}, "Input should be a finite number"),
        ("precision", {"loss_scale": 1e300}, "Input should be less than or equal to 1099511627776"),
        ("model", {"num_heads": 10**9}, "Input should be less than or equal to 65536"),
        ("model", {"num_layers": 10**9}, "Input should be less than or equal to 65536"),
        ("mesh", {"pp": 10**9}, "Input should be less than or equal to 1048576"),
    ],
)
def test_what_means_nothing_is_refused_by_its_type_and_range(section: str, values: Sections, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_dict(RunConfig, {section: values}, "test")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.lr", "inf"], "command line: optimizer.lr = inf: Input should be a finite number"),
        (["--output", ""], "command line: output = '': Input should not be empty"),
        (["--log.record-steps", "-3"], "command line: log.record_steps.0 = -3: Input should be greater than 0"),
    ],
)
def test_the_command_line_has_the_same_rules(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(arguments)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"global_block_indices": [4]}, "global_block_indices: 4 is outside the 4 blocks of train.sequence_length=64"),
        ({"global_block_indices": [-1]}, "global_block_indices: -1 is outside the 4 blocks"),
        (
            {"global_block_indices": [0], "global_block_end_indices": [5]},
            "global_block_end_indices: 5 is outside the 4 blocks of train.sequence_length=64; use 0 to 4",
        ),
    ],
)
def test_a_sparse_index_past_the_end(values: Sections, message: str) -> None:
    sparse = {"mode": "variable", "block": 16, **values}
    changes = {"model": {"attention": {"sparse": sparse}}, "train": {"sequence_length": 64}}
    with pytest.raises(ConfigError) as refused:
        validate(config(**changes), 1)
    assert message in str(refused.value)


def test_a_world_that_nobody_has_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="world_size=1099511627776 is no number of ranks; start 1 to 1048576"):
        validate(config(**SMALL), 1 << 40)
    with pytest.raises(ConfigError, match="world_size=0 is no number of ranks"):
        validate(config(**SMALL), 0)
