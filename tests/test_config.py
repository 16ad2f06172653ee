"""Configurations: every refusal names the value, the rule and the way out; files and command lines read back alike."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from megatron_ds.config import RunConfig, from_dict, load_toml, parse, to_toml, validate
from megatron_ds.config import transformer as transformer_module
from megatron_ds.config.other_names import OTHER_NAMES
from megatron_ds.config.schema import OptimizerConfig
from megatron_ds.errors import ConfigError, divisors
from megatron_ds.mesh import MeshShape
from megatron_ds.train.alike import digest

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.toml"))

SMALL: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 6, "hidden_size": 48, "num_heads": 6, "kv_heads": 2, "vocab_size": 100},
    "train": {"global_batch": 8, "micro_batch": 2, "sequence_length": 32, "steps": 100},
    "data": {"synthetic": True},
}
LONGROPE = {
    "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 8, "short_factor": [1.0, 1.0],
    "long_factor": [1.0, 2.0],
}  # fmt: skip

CONTEXT = {"original_max_position_embeddings": 8}
BY_SIX = {"vocab_multiple": 6}  # what six tensor-parallel ranks can split


def config(**sections: dict[str, Any]) -> RunConfig:
    """A small legal run, with the given fields of the given sections changed."""
    names = SMALL.keys() | sections.keys()
    return from_dict(RunConfig, {n: {**SMALL.get(n, {}), **sections.get(n, {})} for n in names}, "test")


# --- validation -------------------------------------------------------------------------------------------------

# world size, what is changed from SMALL, the whole message.
REFUSED: list[tuple[int, dict[str, dict[str, Any]], str]] = [
    (
        1,
        {"model": {"num_heads": 6, "kv_heads": 4}},
        "model.num_heads=6 is not a multiple of model.kv_heads=4; kv_heads may be 1, 2, 3 or 6",
    ),
    (
        1,
        {"model": {"family": "bert", "position": "alibi"}},
        "model.position='alibi' with model.family='bert': ALiBi's bias is for tokens that look back; use 'learned', "
        "'rope' or 'none'",
    ),
    (
        1,
        {"model": {"family": "bert"}, "data": {"conversations": True, "synthetic": False, "prefix": "corpus"}},
        "data.conversations and data.fim.rate are for model.family='gpt': a BERT predicts masked tokens of texts",
    ),
    (
        1,
        {"model": {"hidden_size": 50}},
        "model.hidden_size=50 is not a multiple of model.num_heads=6; use 48 or 54, or set model.head_dim",
    ),
    (4, {"mesh": {"tp": 4}}, "model.kv_heads=2 cannot be split over mesh.tp=4; tp may be 1, 2 or 6"),
    (
        6,
        {
            "mesh": {"tp": 6, "sequence_parallel": False},
            "model": {"qk_norm": True, "qk_norm_over": "projection", **BY_SIX},
        },
        "model.kv_heads=2 are fewer than mesh.tp=6, and the norm over all of them (model.qk_norm_over='projection') is "
        "not known to be of repeated heads; use mesh.tp=2 or fewer",
    ),
    (
        6,
        {"mesh": {"tp": 6, "sequence_parallel": False}, "precision": {"fp8": "blockwise"}, "model": BY_SIX},
        "precision.fp8='blockwise' with model.kv_heads=2 < mesh.tp=6: what repeats key/value heads has no products in "
        "FP8; use mesh.tp=2 or fewer",
    ),
    (
        2,
        {"mesh": {"tp": 2}, "model": {"ffn_hidden_size": 99}},
        "model.ffn_hidden_size=99 cannot be split over mesh.tp=2; use 98 or 100",
    ),
    (
        2,
        {"mesh": {"tp": 2}, "model": {"vocab_size": 100, "vocab_multiple": 15}},
        "the vocabulary padded to 105 (model.vocab_size=100, model.vocab_multiple=15) cannot be split over "
        "mesh.tp=2; use model.vocab_multiple=30",
    ),
    (
        1,
        {"model": {"position": "rope", "head_dim": 7}},
        "rotary positions need an even head_dim, not 7; use 6 or 8",
    ),
    (
        1,
        {"model": {"position": "rope", "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0}}},
        "model.rope_scaling={'factor': 8.0, 'low_freq_factor': 1.0} lacks "
        "['high_freq_factor', 'original_max_position_embeddings']",
    ),
    (
        1,
        {"model": {"position": "rope", "rope_scaling": {"rope_type": "ntk"}}},
        "model.rope_scaling.rope_type='ntk' is not known; use linear, dynamic, llama3, yarn, longrope",
    ),
    (
        1,
        {"model": {"position": "rope", "rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}},
        "model.rope_scaling={'factor': 2.0, 'beta': 1} has ['beta'], which rope_type='linear' does not take; leave "
        "them out",
    ),
    (
        1,
        {"model": {"position": "rope", "head_dim": 4, "rope_scaling": {**LONGROPE, "long_factor": [1.0]}}},
        "model.rope_scaling.long_factor=(1.0,) should be 2 positive numbers, one for every two rotated dims of a head",
    ),
    (
        1,
        {"model": {"position": "rope", "rope_scaling": {"rope_type": "linear", "factor": -1.0}}},
        "model.rope_scaling.factor=-1.0 should be a positive number",
    ),
    (
        1,
        {"model": {"position": "rope", "rotary_dim": 16}},
        "model.rotary_dim=16 is more than the 8 dims of a head; use that or fewer",
    ),
    (
        1,
        {
            "model": {
                "position": "rope",
                "rotary_dim": 2,
                "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4},
            }
        },
        "model.rope_scaling.rope_type='dynamic' does nothing with 2 rotated dims of a head: they turn by 1 a token "
        "for any model.rope_theta, which it raises; leave model.rope_scaling out",
    ),
    (
        1,
        {
            "model": {
                "position": "rope",
                "rope_scaling": {"factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 2.0, **CONTEXT},
            }
        },
        "model.rope_scaling.high_freq_factor=2.0 should be above low_freq_factor=2.0: wavelengths between the two are "
        "blended",
    ),
    (
        1,
        {
            "model": {
                "position": "rope",
                "rope_theta": 1.0,
                "rope_scaling": {"rope_type": "yarn", "factor": 8.0, **CONTEXT},
            }
        },
        "model.rope_theta=1.0 makes all wavelengths one, of which model.rope_scaling.rope_type='yarn' would stretch "
        "the long ones; use another rope_theta, or 'linear'",
    ),
    (
        1,
        {"model": {"position": "rope", "head_dim": 4, "rope_scaling": {**LONGROPE, **dict.fromkeys(CONTEXT, 1)}}},
        "model.rope_scaling.original_max_position_embeddings=1 should be above 1: by its logarithm longrope "
        "scales cos and sin; or give attention_factor",
    ),
    (
        1,
        {"model": {"residual": "parallel", "norm_position": "post"}},
        "model.residual='parallel' with model.norm_position='post': attention and MLP side by side have their norms "
        "before them; use model.norm_position='pre', or model.residual='sequential'",
    ),
    (
        1,
        {"model": {"window": 4, "attention_pattern": ("full",) * 6 + ("window",)}},
        "model.attention_pattern has 7 entries for model.num_layers=6 layers; use 1 to 6, which are repeated",
    ),
    (
        1,
        {"model": {"max_positions": 16}},
        "train.sequence_length=32 is longer than model.max_positions=16; raise max_positions or shorten the sequence",
    ),
    (
        2,
        {"mesh": {"tp": 2}, "train": {"sequence_length": 33}},
        "train.sequence_length=33 cannot be split over mesh.tp=2 for sequence parallelism; use 32 or 34, or "
        "--mesh.no-sequence-parallel",
    ),
    (
        4,
        {"mesh": {"tp": 2}, "train": {"global_batch": 10, "micro_batch": 2}},
        "train.global_batch=10 is not a multiple of train.micro_batch=2 x dp=2 = 4 (dp is world_size=4 / "
        "model-parallel 2); use 8 or 12",
    ),
    (
        1,
        {"optimizer": {"warmup_steps": 101}},
        "optimizer.warmup_steps=101 is more than the 100 steps of the schedule",
    ),
    (1, {"optimizer": {"lr": 1e-4, "min_lr": 1e-3}}, "optimizer.min_lr=0.001 is above optimizer.lr=0.0001"),
    (
        1,
        {"precision": {"dtype": "fp16", "initial_loss_scale": 16.0, "min_loss_scale": 64.0}},
        "precision.initial_loss_scale=16 is below precision.min_loss_scale=64",
    ),
    (
        1,
        {"train": {"global_batch": 1 << 20, "micro_batch": 1}},
        "train.global_batch=1048576 is 1048576 micro-batches a replica and step, of which there may be 65536; raise "
        "train.micro_batch",
    ),
    (2, {"mesh": {"cp": 2}}, "mesh.cp=2: context parallelism is not built yet; use mesh.cp=1"),
    (
        1,
        {"train": {"late_check": True}, "precision": {"dtype": "fp16"}},
        "train.late_check with precision.dtype='fp16': the step after an overflow begins before the dynamic loss scale "
        "has halved; set precision.loss_scale, use precision.dtype='bf16', or use --train.no-late-check",
    ),
    (
        1,
        {"train": {"late_check": True}, "zero": {"stage": 3}},
        "train.late_check with zero.stage=3, which compares the order of gathers at each update; use stage 2, or use "
        "--train.no-late-check",
    ),
    (
        1,
        {"train": {"late_check": True}, "zero": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        "train.late_check with zero.offload_optimizer.device='cpu': the host waits for what it fetches and takes back; "
        "keep the state on the device, or use --train.no-late-check",
    ),
    (
        1,
        {"train": {"late_check": True}, "log": {"record_steps": [2]}},
        "train.late_check with log.record_steps, for which the host waits for each action; leave it out, or use "
        "--train.no-late-check",
    ),
]


# What the pipeline's own pass says.
OF_THE_PIPELINE: list[tuple[int, dict[str, dict[str, Any]], str]] = [
    (8, {"mesh": {"pp": 8}}, "model.num_layers=6 cannot fill 8 stages (mesh.pp); use pp <= 6"),
    (
        2,
        {"mesh": {"pp": 2}, "pipeline": {"layers_per_stage": [3, 2]}},
        "pipeline.layers_per_stage=[3, 2] must be 2 positive numbers (mesh.pp) with the sum 6 (model.num_layers); "
        "it has 2 with the sum 5",
    ),
]


@pytest.mark.parametrize(
    ("world_size", "changes", "message"), [*REFUSED, *OF_THE_PIPELINE], ids=lambda value: str(value)[:40]
)
def test_a_refusal_names_value_rule_and_way_out(world_size: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config(**changes), world_size)
    assert str(refused.value) == message


def test_every_check_of_the_validation_is_refused_above() -> None:
    """But for the ramp-up's, which tests/test_data_config.py shows."""
    places = (sys.modules[validate.__module__], transformer_module, OptimizerConfig.faults)
    bodies = [ast.parse(textwrap.dedent(inspect.getsource(place))).body for place in places]
    functions = [f for body in bodies for f in body if isinstance(f, ast.FunctionDef)]
    checks = [n for f in functions if f.name != "_ramp_faults" for n in ast.walk(f) if isinstance(n, ast.Yield)]
    beginnings = {re.split(r"[=\d]", message)[0] + message[-60:] for _, _, message in REFUSED}
    assert len(beginnings) == len(REFUSED), "two rows show the same refusal"
    assert len(checks) == len(REFUSED)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (8, {"mesh": {"tp": 2, "pp": 2}}),
        (2, {"mesh": {"tp": 2, "sequence_parallel": False}, "train": {"sequence_length": 33}}),
        (2, {"mesh": {"pp": 2}, "pipeline": {"layers_per_stage": [5, 1]}}),
        (1, {"model": {"hidden_size": 50, "head_dim": 8}}),
        (1, {"model": {"position": "rope", "max_positions": 16}}),
        (1, {"optimizer": {"warmup_steps": 150, "decay_steps": 200}}),
        (1, {"precision": {"dtype": "fp16", "loss_scale": 128.0}}),
        (1, {"data": {"synthetic": False, "prefix": "corpus"}}),
    ],
    ids=str,
)
def test_what_is_legal_passes_and_gives_the_mesh(world_size: int, changes: dict[str, Any]) -> None:
    checked = config(**changes)
    shape = validate(checked, world_size)
    assert shape.world_size == world_size
    assert (shape.tp, shape.pp, shape.cp) == (checked.mesh.tp, checked.mesh.pp, 1)


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config(model={"kv_heads": 4}, optimizer={"warmup_steps": 101}, data={"synthetic": False}), 1)
    lines = str(refused.value).splitlines()
    assert [line[:4] for line in lines] == ["", "  - ", "  - ", "  - "]
    assert "kv_heads=4" in lines[1] and "data.prefix" in lines[2] and "warmup_steps=101" in lines[3]


@given(st.integers(1, 400))
def test_divisors_are_the_numbers_that_divide(number: int) -> None:
    found = [int(text) for text in re.findall(r"\d+", divisors(number))]
    assert found == [d for d in range(1, number + 1) if number % d == 0]


def test_derived_sizes() -> None:
    assert config().model.kv_heads == 2 and config(model={"kv_heads": None}).model.num_kv_heads == 6
    assert config(model={"hidden_size": 4096, "activation": "swiglu"}).model.ffn_size == 10944  # 10922.67, up to 64
    assert config(model={"activation": "gelu"}).model.ffn_size == 192
    assert config(model={"vocab_size": 50257}).model.padded_vocab == 50304
    assert config(model={"vocab_size": 128}).model.padded_vocab == 128


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nnum_layer = 3", "unknown key 'model.num_layer'; did you mean 'model.num_layers'?"),
        ("[modle]\nnum_layers = 3", "unknown key 'modle'; did you mean 'model'?"),
        ("[optimizer]\nLR = 3", "unknown key 'optimizer.LR'; did you mean 'optimizer.lr'?"),
        ("[train]\nclip_grad = 3", "unknown key 'train.clip_grad'; did you mean 'optimizer.clip_norm'?"),
        ("[model]\nqqqq = 3", "unknown key 'model.qqqq'"),
        ("[train]\nsteps = 0", "train.steps = 0: Input should be greater than 0"),
        ("[train]\nsteps = 1.5", "train.steps = 1.5: Input should be a valid integer"),
        ('[precision]\ndtype = "fp8"', "precision.dtype = 'fp8': Input should be 'fp32', 'bf16', 'fp16' or 'fp64'"),
        ("[zero]\nstage = 4", "zero.stage = 4: Input should be 0, 1, 2 or 3"),
        ("[zero.offload_optimizer]\nratio = 1.5", "zero.offload_optimizer.ratio = 1.5: Input should be"),
        ("model = 3", "model = 3: Input should be a valid dictionary"),
        ("[train]\nsteps = 0\nmicro_batch = -1", "train.steps = 0"),
        ("[train]\nsteps = 0\nmicro_batch = -1", "train.micro_batch = -1"),
        ("[train", "not valid TOML: "),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_toml(path)
    assert str(path) in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "cannot be read: it is a directory, not a regular file"),
        (os.mkfifo, "cannot be read: it is a FIFO, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "cannot be read: it is a device, not a regular file"),
        (lambda path: path.write_bytes(b"seed = 1\n# caf\xe9\n"), "not UTF-8, at byte 14; save it as UTF-8"),
        (lambda path: path.write_text("x = " + "[" * 200_000), "not valid TOML: "),
    ],
)
def test_what_is_no_configuration_file_is_one_error(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "run.toml")
    with pytest.raises(ConfigError) as refused:
        parse(["--config", str(tmp_path / "run.toml")])
    assert str(refused.value).startswith(f"--config {tmp_path / 'run.toml'}") and message in str(refused.value)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--config nowhere\.toml: no such file$"):
        load_toml("nowhere.toml")


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """Runs that differ from the defaults in every kind of field: text, numbers, tables, tuples, choices, nothing."""
    small, positive = st.floats(1e-12, 0.99), st.integers(1, 10**9)
    return from_dict(
        RunConfig,
        {
            "output": draw(TEXT),
            "compile": draw(st.booleans()),
            "threads": draw(st.none() | positive),
            "model": {
                "kv_heads": draw(st.none() | st.integers(1, 1 << 16)),
                "position": draw(st.sampled_from(["learned", "rope", "alibi"])),
                "rope_scaling": draw(st.none() | st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), small)),
                "hidden_dropout": draw(small),
            },
            "optimizer": {"lr": draw(small), "eps": draw(small)},
            "pipeline": {"layers_per_stage": draw(st.none() | st.lists(positive, max_size=4))},
            "data": {
                "prefix": draw(st.none() | TEXT),
                "blend": draw(st.lists(st.tuples(small, TEXT), max_size=3)),
                "fim": {"rate": draw(small), "tokens": draw(st.none() | st.tuples(TEXT, TEXT, TEXT))},
            },
            "log": {"record_steps": draw(st.lists(st.integers(1, 99), max_size=3))},
        },
        "drawn",
    )


@settings(max_examples=60)
@given(configs())
def test_toml_reads_back_to_the_same_configuration(drawn: RunConfig) -> None:
    again = from_dict(RunConfig, tomllib.loads(to_toml(drawn)), "again")
    assert again == drawn
    assert digest(again.to_dict()) == digest(drawn.to_dict())


def test_a_file_reads_back_to_the_same_configuration(tmp_path: Path) -> None:
    original = config(train={"steps": 7}, data={"prefix": 'a "quoted" \\path\\ with\ttabs, é, 😀 and \x7f'})
    (tmp_path / "run.toml").write_text(to_toml(original), encoding="utf-8")
    assert load_toml(tmp_path / "run.toml") == original


def with_value(section: BaseModel, path: list[str], value: Any) -> Any:
    """A copy in which the field at ``path`` has another value, unchecked."""
    first, *rest = path
    return section.model_copy(update={first: with_value(getattr(section, first), rest, value) if rest else value})


def test_what_ranks_compare_depends_on_every_setting() -> None:
    base = RunConfig()
    found = [digest(base.to_dict())]
    for key, _ in fields():
        changed = with_value(base, key.split("."), 77)
        with warnings.catch_warnings():  # 77 is not of the field's type: the hash does not mind
            warnings.simplefilter("ignore")
            found.append(digest(changed.to_dict()))
    assert len(set(found)) == len(fields()) + 1


# --- command line -----------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("seed = 5\n[train]\nsteps = 10\nglobal_batch = 4\n[mesh]\nsequence_parallel = false\n")
    for start in (["--config", str(path)], [f"--config={path}"]):
        read = parse([*start, "--train.steps", "20", "--pipeline.layers-per-stage", "1", "11", "--zero.no-overlap"])
        assert (read.seed, read.train.steps, read.train.global_batch) == (5, 20, 4)
        assert read.pipeline.layers_per_stage == (1, 11)
        assert not read.mesh.sequence_parallel and not read.zero.overlap
        assert read.model == RunConfig().model
    assert parse(["--train.steps=3", "--mesh.sequence-parallel"]).train.steps == 3
    assert parse(["--train.micro_batch", "3"]).train.micro_batch == 3  # underscores, as in the file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.stepz", "3"], "command line: unknown option --train.stepz; did you mean '--train.steps'?"),
        (["--lr", "3"], "command line: unknown option --lr; did you mean '--optimizer.lr'?"),
        (
            ["--tensor-model-parallel-size=2"],
            "command line: unknown option --tensor-model-parallel-size; did you mean '--mesh.tp'?",
        ),
        (
            ["--train.batch_size", "3"],
            "command line: unknown option --train.batch-size; did you mean '--train.global-batch'?",
        ),
        (["--bf16"], "command line: unknown option --bf16; did you mean '--precision.dtype bf16'?"),
        (
            ["--schedule", "1f1b"],
            "command line: unknown option --schedule; did you mean '--optimizer.schedule' or '--pipeline.schedule'?",
        ),
        (["--confg", "x"], "command line: unknown option --confg; did you mean '--config'?"),
        (["--zzz"], "command line: unknown option --zzz"),
        (
            ["--mesh.no-sequence-paralel"],
            "command line: unknown option --mesh.no-sequence-paralel; did you mean '--mesh.no-sequence-parallel'?",
        ),
        (["--config"], "--config needs a file name, e.g. --config examples/configs/gpt2-345m.toml"),
        (["--config", "nowhere.toml"], "--config nowhere.toml: no such file"),
        (
            ["--config", str(CONFIGS[0]), "--config", str(CONFIGS[1])],
            "--config is given twice; use one file, and options for what differs",
        ),
        (["--train.steps", "0"], "command line: train.steps = 0: Input should be greater than 0"),
        (["--seed", "-1"], "command line: seed = -1: Input should be greater than or equal to 0"),
    ],
)
def test_a_bad_command_line_is_one_error(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(arguments)
    assert str(refused.value) == message
    assert capfd.readouterr() == ("", ""), "every rank would print it once more"


def test_what_settings_are_called_elsewhere_are_settings_here_under_another_name() -> None:
    def keys(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in section.items():
            yield f"{prefix}{name}".replace("_", "-")
            yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) else ()

    known = set(keys(RunConfig().to_dict()))
    meant = {name: target.split(" ")[0] for name, target in OTHER_NAMES.items()}
    assert set(meant.values()) <= known and not meant.keys() & known
    assert all(not target.endswith(f".{name}") for name, target in meant.items()), "its last part says that already"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--train.steps", "many"], ["command line: ", "--train.steps", "'many'"]),
        (["--precision.dtype", "fp8"], ["command line: ", "'fp8'", "--precision.dtype", "'bf16'"]),
        (["stray"], ["command line: ", "stray"]),
        (["--data.split"], ["command line: ", "--data.split"]),
    ],
)
def test_what_the_option_parser_refuses_is_one_error_too(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(arguments)
    assert all(part in str(refused.value) for part in parts), refused.value
    assert not set("│╭╰─") & set(str(refused.value))


def fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[tuple[str, str | None]]:
    """(dotted key, description) of every setting."""
    found: list[tuple[str, str | None]] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += fields(field.annotation, f"{prefix}{name}.")
        else:
            found.append((prefix + name, field.description))
    return found


def test_help_shows_every_field_with_its_description(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert len(fields()) > 70
    for key, description in fields():
        assert description and description.rstrip().endswith("."), f"{key} needs a description, a whole sentence"
        flag = "--" + key.replace("_", "-")
        assert re.search(rf"{re.escape(flag)}[ ,]", shown), f"--help lacks {flag}"
        assert " ".join(description.split()) in shown, f"--help lacks the meaning of {key}"


def test_help_shows_the_values_of_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "run.toml").write_text("[train]\nsteps = 12345\n")
    with pytest.raises(SystemExit):
        parse(["--config", str(tmp_path / "run.toml"), "--help"])
    assert "(default: 12345)" in capsys.readouterr().out


def test_print_config_reads_back(tmp_path: Path) -> None:
    demo = str(ROOT / "examples" / "configs" / "demo.toml")
    done = subprocess.run(
        [sys.executable, "examples/pretrain_gpt.py", "--config", demo, "--train.steps", "7", "--print-config"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "shown.toml").write_text(done.stdout)
    assert load_toml(tmp_path / "shown.toml") == parse(["--config", demo, "--train.steps", "7"])


# --- the mesh that a world size leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "wanted", "message"),
    [
        (
            7,
            {"tp": 2, "pp": 2},
            "world_size=7 cannot be divided by pp=2 x cp=1 x tp=2 = 4; start 4 or 8 ranks, or change mesh.pp, mesh.cp "
            "or mesh.tp so that their product divides 7",
        ),
        (
            3,
            {"tp": 4},
            "world_size=3 cannot be divided by pp=1 x cp=1 x tp=4 = 4; start 4 ranks, or change mesh.pp, mesh.cp "
            "or mesh.tp so that their product divides 3",
        ),
        (
            8,
            {"tp": 2, "dp": 3},
            "mesh.dp=3, but world_size=8 / (pp=1 x cp=1 x tp=2) leaves dp=4; leave mesh.dp unset, or start 6 ranks",
        ),
    ],
)
def test_a_world_that_the_mesh_does_not_divide(world_size: int, wanted: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        MeshShape.for_world(world_size, **wanted)
    assert str(refused.value) == message
    with pytest.raises(ConfigError) as refused:
        validate(config(mesh=wanted), world_size)
    assert str(refused.value) == message
