"""DeepSpeed files: every key that people have is honoured, noted or refused by name; contradictions are told."""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from deepspeed_table import LINES, MEANINGS, here, lists, row_of

from megatron_ds.config.engine import EngineConfig, batch_sizes
from megatron_ds.deepspeed_json import auto_values, from_deepspeed, is_deepspeed
from megatron_ds.deepspeed_json.keys import KEYS
from megatron_ds.engine import read_config
from megatron_ds.errors import ConfigError

ZERO = "zero_optimization"


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = whole
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return whole


def value_of(config: EngineConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


# Key, its value, what else the file needs, what it becomes.
HONOURED: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
    ("train_batch_size", 32.0, {}, {"global_batch": 32}),
    ("train_micro_batch_size_per_gpu", 4, {}, {"micro_batch": 4}),
    ("gradient_accumulation_steps", 3, {}, {"accumulation": 3}),
    ("gradient_clipping", 1, {}, {"optimizer.clip_norm": 1.0}),
    ("steps_per_print", 1e2, {}, {"log.every": 100}),
    ("steps_per_print", math.inf, {}, {"log.every": 0}),
    ("wall_clock_breakdown", True, {}, {"log.breakdown": True}),
    ("bf16.enabled", True, {}, {"precision.dtype": "bf16"}),
    ("fp16.enabled", True, {}, {"precision.dtype": "fp16", "precision.loss_scale": None}),
    ("fp16.auto_cast", True, {"fp16.enabled": True}, {"cast_inputs": True}),
    ("fp16.loss_scale", 128, {"fp16.enabled": True}, {"precision.loss_scale": 128.0}),
    ("fp16.loss_scale", 0, {"fp16.enabled": True}, {"precision.loss_scale": None, "precision.loss_scale_wait": 1}),
    ("fp16.initial_scale_power", 12, {"fp16.enabled": True}, {"precision.initial_loss_scale": 4096.0}),
    ("fp16.loss_scale_window", 500, {"fp16.enabled": True}, {"precision.loss_scale_window": 500}),
    ("fp16.hysteresis", 3, {"fp16.enabled": True}, {"precision.loss_scale_hysteresis": 3}),
    ("fp16.min_loss_scale", 2, {"fp16.enabled": True}, {"precision.min_loss_scale": 2.0}),
    ("optimizer.type", "Adam", {}, {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.weight_decay": 0.0}),
    ("optimizer.params.lr", 3e-5, {"optimizer.type": "AdamW"}, {"optimizer.lr": 3e-5}),
    (
        "optimizer.params.betas",
        [0.8, 0.999],
        {"optimizer.type": "AdamW"},
        {"optimizer.beta1": 0.8, "optimizer.beta2": 0.999},
    ),
    ("optimizer.params.eps", 1e-6, {"optimizer.type": "AdamW"}, {"optimizer.eps": 1e-6}),
    ("optimizer.params.weight_decay", 0.2, {"optimizer.type": "AdamW"}, {"optimizer.weight_decay": 0.2}),
    ("optimizer.params.torch_adam", True, {"optimizer.type": "Adam"}, {"optimizer.name": "adamw"}),
    ("optimizer.params.adam_w_mode", True, {"optimizer.type": "Adam"}, {"optimizer.name": "adamw"}),
    ("optimizer.params.adam_w_mode", False, {"optimizer.type": "Adam"}, {"torch_optimizer.name": "Adam"}),
    ("optimizer.params.momentum", 0.9, {"optimizer.type": "SGD"}, {"torch_optimizer.params": {"momentum": 0.9}}),
    ("scheduler.type", "WarmupLR", {}, {"schedule.name": "WarmupLR"}),
    ("scheduler.params.warmup_min_lr", 1e-6, {"scheduler.type": "WarmupLR"}, {"schedule.warmup_min_lr": 1e-6}),
    ("scheduler.params.warmup_max_lr", 1e-4, {"scheduler.type": "WarmupLR"}, {"schedule.warmup_max_lr": 1e-4}),
    ("scheduler.params.warmup_num_steps", 1e1, {"scheduler.type": "WarmupLR"}, {"schedule.warmup_num_steps": 10}),
    (
        "scheduler.params.total_num_steps",
        5e3,
        {"scheduler.type": "WarmupCosineLR"},
        {"schedule.total_num_steps": 5000},
    ),
    (f"{ZERO}.stage", 2, {}, {"zero.stage": 2}),
    (f"{ZERO}.offload_optimizer.device", "cpu", {f"{ZERO}.stage": 2}, {"zero.offload_optimizer.device": "cpu"}),
    (
        f"{ZERO}.offload_optimizer.nvme_path",
        "/swap",
        {f"{ZERO}.stage": 2, f"{ZERO}.offload_optimizer.device": "nvme"},
        {"zero.offload_optimizer.path": "/swap"},
    ),
    (
        f"{ZERO}.offload_optimizer.pin_memory",
        False,
        {f"{ZERO}.stage": 2, f"{ZERO}.offload_optimizer.device": "cpu"},
        {"zero.offload_optimizer.pin_memory": False},
    ),
    (
        f"{ZERO}.offload_optimizer.ratio",
        0.3,
        {f"{ZERO}.stage": 3, f"{ZERO}.offload_optimizer.device": "cpu"},
        {"zero.offload_optimizer.ratio": 0.3},
    ),
    (f"{ZERO}.offload_param.device", "cpu", {f"{ZERO}.stage": 3}, {"zero.offload_parameters.device": "cpu"}),
    (
        f"{ZERO}.offload_param.nvme_path",
        "/swap",
        {f"{ZERO}.stage": 3, f"{ZERO}.offload_param.device": "nvme"},
        {"zero.offload_parameters.path": "/swap"},
    ),
    (
        f"{ZERO}.offload_param.pin_memory",
        False,
        {f"{ZERO}.stage": 3, f"{ZERO}.offload_param.device": "cpu"},
        {"zero.offload_parameters.pin_memory": False},
    ),
    (f"{ZERO}.overlap_comm", False, {}, {"zero.overlap": False}),
    (f"{ZERO}.reduce_bucket_size", 5e8, {}, {"zero.bucket_mb": 2000.0}),
    (f"{ZERO}.stage3_prefetch_bucket_size", 0, {f"{ZERO}.stage": 3}, {"zero.prefetch": 0}),
    (f"{ZERO}.stage3_prefetch_bucket_size", 0.9 * 4e6, {f"{ZERO}.stage": 3}, {"zero.prefetch": 1}),
    (f"{ZERO}.stage3_param_persistence_threshold", 1e5, {f"{ZERO}.stage": 3}, {"zero.persistence_threshold": 100000}),
    (f"{ZERO}.zero_hpz_partition_size", 8, {f"{ZERO}.stage": 3}, {"zero.secondary_size": 8}),
    (f"{ZERO}.zero_quantized_weights", True, {f"{ZERO}.stage": 3}, {"zero.quantized_weights": "int8"}),
    (f"{ZERO}.zero_quantized_gradients", True, {f"{ZERO}.stage": 3}, {"zero.quantized_gradients": "int4"}),
]
# These change no result, whatever their value: there is a note.
NOTED: dict[str, Any] = {
    "zero_allow_untested_optimizer": True,
    "aio": {"block_size": 1048576, "queue_depth": 8, "thread_count": 1, "single_submit": False, "overlap_events": True},
    f"{ZERO}.offload_optimizer.buffer_count": 4,
    f"{ZERO}.offload_optimizer.fast_init": False,
    f"{ZERO}.offload_param.buffer_count": 5,
    f"{ZERO}.offload_param.buffer_size": 1e8,
    f"{ZERO}.offload_param.max_in_cpu": 1e9,
    f"{ZERO}.contiguous_gradients": True,
    f"{ZERO}.reduce_scatter": True,
    f"{ZERO}.allgather_partitions": True,
    f"{ZERO}.allgather_bucket_size": 2e8,
    f"{ZERO}.sub_group_size": 1e9,
    f"{ZERO}.stage3_max_live_parameters": 1e9,
    f"{ZERO}.stage3_max_reuse_distance": 1e9,
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": True,
    f"{ZERO}.stage3_gather_fp16_weights_on_model_save": True,
    f"{ZERO}.round_robin_gradients": True,
    **dict.fromkeys(
        (
            "activation_checkpointing.partition_activations",
            "activation_checkpointing.cpu_checkpointing",
            "activation_checkpointing.contiguous_memory_optimization",
            "activation_checkpointing.synchronize_checkpoint_boundary",
            "activation_checkpointing.profile",
            "prescale_gradients",
            "disable_allgather",
            "dataloader_drop_last",
            f"{ZERO}.parameter_alignment",
        ),
        True,
    ),
    "activation_checkpointing.number_checkpoints": 4,
    "gradient_predivide_factor": 2.0,
    "flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "top_modules": 3, "detailed": True},
    "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
    "_comment": "from a colleague",
    "comms_config": {"comms_logger": {"enabled": True}},
    "monitor_config": {"tensorboard": {"enabled": False}},
    "fp16.opt_level": "O2",
    f"{ZERO}.leaf_module.classes": ["Experts"],
}
ALIASED: list[tuple[str, Any, str]] = [
    ("bfloat16.enabled", True, "bf16.enabled"),
    (f"{ZERO}.max_live_parameters", 1e9, f"{ZERO}.stage3_max_live_parameters"),
    (f"{ZERO}.max_reuse_distance", 1e9, f"{ZERO}.stage3_max_reuse_distance"),
    (f"{ZERO}.prefetch_bucket_size", 0, f"{ZERO}.stage3_prefetch_bucket_size"),
    (f"{ZERO}.param_persistence_threshold", 7, f"{ZERO}.stage3_param_persistence_threshold"),
    (f"{ZERO}.gather_16bit_weights_on_model_save", True, f"{ZERO}.stage3_gather_16bit_weights_on_model_save"),
]
REMOVED_THERE = [
    "sparse_attention", "elasticity", "compression_training", "curriculum_learning", "progressive_layer_drop", "amp",
    "eigenvalue", "nebula", "quantize_training", "sparse_gradients", "graph_harvesting",
    f"{ZERO}.mics_hierarchical_params_gather", f"{ZERO}.zeropp_loco_param",
]  # fmt: skip
# Key, value that is refused, what the message says to do.
REFUSED = [
    ("gradient_allreduce_op", "sum", "multiply the loss"),
    ("managed_gradient_accumulation", False, "set_gradient_accumulation_boundary"),
    ("compile.deepcompile", True, "engine.compile()"),
    ("tensor_parallel", {"autotp_size": 2}, "on a mesh with tp"),
    ("data_types.param_dtype", "bf16", "use bf16 or fp16"),
    ("sequence_parallel_size", 2, "megatron_ds.models"),
    (f"{ZERO}.zenflow", {"topk_ratio": 0.1}, "every update is a whole one"),
    (f"{ZERO}.offload_optimizer.super_offload", True, "pin_memory"),
    (f"{ZERO}.zero_quantized_nontrainable_weights", True, "use zero_quantized_weights"),
    ("amp", {"enabled": True}, '"bf16" or "fp16"'),
    ("sparse_attention", {"mode": "fixed"}, "model.attention.sparse"),
    ("checkpoint.load_universal", True, "any checkpoint loads on any number of ranks"),
    ("checkpoint.use_node_local_storage", True, "a directory that all ranks see"),
    ("tensor_parallel.autotp_size", 2, "on a mesh with tp"),
    ("wandb", {"enabled": True}, "engine.step()"),
    ("communication_data_type", "fp16", "fp32"),
]


@pytest.mark.parametrize(("key", "value", "rest", "becomes"), HONOURED, ids=lambda value: str(value)[:50])
def test_a_key_is_honoured(key: str, value: Any, rest: dict[str, Any], becomes: dict[str, Any]) -> None:
    config, notes = from_deepspeed(nested({**rest, key: value}))
    assert {name: value_of(config, name) for name in becomes} == becomes
    assert not any(note.startswith(key) for note in notes)


@pytest.mark.parametrize(("key", "value"), NOTED.items())
def test_a_key_without_a_counterpart_is_noted_and_changes_nothing(key: str, value: Any) -> None:
    config, notes = from_deepspeed(nested({f"{ZERO}.stage": 1, key: value}))
    assert config == from_deepspeed({ZERO: {"stage": 1}})[0]
    (note,) = notes
    assert note.startswith(f"{key}=") and len(note) > len(key) + 25


@pytest.mark.parametrize(("key", "value", "instead"), REFUSED)
def test_a_key_is_refused_by_name_with_what_to_do(key: str, value: Any, instead: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_deepspeed(nested({key: value}))
    assert key in str(refused.value) and instead in str(refused.value)


@pytest.mark.parametrize("key", [key for key, row in KEYS.items() if type(row).__name__ == "Refused"])
def test_a_refused_key_that_asks_for_nothing_is_let_be(key: str) -> None:
    harmless = KEYS[key].unless[0]  # type: ignore[union-attr]
    assert from_deepspeed(nested({key: harmless}))[0] == from_deepspeed({})[0]


@pytest.mark.parametrize(("key", "value", "own"), ALIASED)
def test_another_name_of_a_key_is_the_key(key: str, value: Any, own: str) -> None:
    stage = {f"{ZERO}.stage": 3}
    assert from_deepspeed(nested({**stage, key: value})) == from_deepspeed(nested({**stage, own: value}))
    with pytest.raises(ConfigError, match="are two names of one key; keep one"):
        from_deepspeed(nested({**stage, key: value, own: value}))


def test_the_switches_of_older_files_are_the_device_cpu() -> None:
    old = {"stage": 3, "cpu_offload": True, "cpu_offload_param": True, "cpu_offload_use_pin_memory": True}
    new = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    assert from_deepspeed({ZERO: old})[0] == from_deepspeed({ZERO: new})[0]
    assert from_deepspeed({ZERO: {"cpu_offload": False}})[0] == from_deepspeed({})[0]
    assert [from_deepspeed({ZERO: on})[0].zero.stage for on in (True, False)] == [1, 0]
    with pytest.raises(ConfigError, match="cpu_offload=1 must be true or false"):
        from_deepspeed({ZERO: {"stage": 1, "cpu_offload": 1}})
    with pytest.raises(ConfigError, match="contradict one another"):
        from_deepspeed({ZERO: {"stage": 1, "cpu_offload": True, "offload_optimizer": {"device": "none"}}})


@pytest.mark.parametrize("key", REMOVED_THERE)
def test_what_deepspeed_has_removed_says_so(key: str) -> None:
    with pytest.raises(ConfigError, match=r"DeepSpeed 0\.19\.8 has removed it; \w+"):
        from_deepspeed(nested({key: {"enabled": True}}))


def test_a_removed_key_that_is_honoured_says_so_too() -> None:
    config, notes = from_deepspeed({ZERO: {"stage": 3, "mics_shard_size": 2}})
    assert config.zero.shard_size == 2 and "DeepSpeed 0.19.8 has removed it" in notes[0]


PEOPLE_HAVE = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "wall_clock_breakdown",
    "bf16.enabled",
    "fp16.enabled",
    "fp16.auto_cast",
    "fp16.loss_scale",
    "fp16.initial_scale_power",
    "fp16.loss_scale_window",
    "fp16.hysteresis",
    "fp16.min_loss_scale",
    "optimizer.type",
    "optimizer.params.lr",
    "optimizer.params.betas",
    "optimizer.params.eps",
    "optimizer.params.weight_decay",
    "optimizer.params.torch_adam",
    "optimizer.params.adam_w_mode",
    "scheduler.type",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.total_num_steps",
    "zero_allow_untested_optimizer",
    "aio",
    "activation_checkpointing.partition_activations",
    "activation_checkpointing.cpu_checkpointing",
    "activation_checkpointing.contiguous_memory_optimization",
    "activation_checkpointing.number_checkpoints",
    "activation_checkpointing.synchronize_checkpoint_boundary",
    "activation_checkpointing.profile",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_optimizer.buffer_count",
    "zero_optimization.offload_optimizer.fast_init",
    "zero_optimization.offload_optimizer.ratio",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.pin_memory",
    "zero_optimization.offload_param.nvme_path",
    "zero_optimization.offload_param.buffer_count",
    "zero_optimization.offload_param.buffer_size",
    "zero_optimization.offload_param.max_in_cpu",
    "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.reduce_scatter",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_partitions",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.sub_group_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save",
    "zero_optimization.round_robin_gradients",
]
ODD = (None, True, False, -1, 0, 1, 2.5, 1e9, math.inf, math.nan, "", "auto", "x", "cpu", [], [0.9], {}, {"enabled": 1})


def test_every_key_that_people_have_is_known_and_tried_above() -> None:
    tried = {key for key, *_ in HONOURED} | set(NOTED) | {key for key, *_ in REFUSED}
    tried |= {key for key in PEOPLE_HAVE if type(KEYS[key]).__name__ == "Refused"}  # each, where it is let be
    assert set(PEOPLE_HAVE) <= tried and len(PEOPLE_HAVE) == len(set(PEOPLE_HAVE)) == 61


@pytest.mark.parametrize("key", KEYS)
def test_no_value_of_a_key_passes_unseen_or_ends_in_another_error(key: str) -> None:
    """A value is honoured, noted or refused under the key's name. ``null`` is as if the key were not there."""
    for stage, value in itertools.product((0, 3), ODD):
        values = nested({key: value} if key == f"{ZERO}.stage" else {f"{ZERO}.stage": stage, key: value})
        try:
            config, notes = from_deepspeed(values)
        except ConfigError as error:
            of_ours = getattr(KEYS[key], "to", key)
            assert key in str(error) or of_ours in str(error) or key.split(".")[0] in str(error), (key, value, error)
            assert value is not None, error
            continue
        plain, _ = from_deepspeed({ZERO: {"stage": stage}})
        if value == "auto":
            pytest.fail(f"{key}='auto' passed")
        if config != plain or value is None or any(note.startswith(key) for note in notes):
            continue
        assert _asks_for_nothing(key, value, plain), (key, value)


def _asks_for_nothing(key: str, value: Any, plain: EngineConfig) -> bool:
    row: Any = KEYS[key]
    if hasattr(row, "unless"):
        return bool(row.lets(value))
    if value == {}:
        return True
    if hasattr(row, "to"):  # as it is without the key
        converted = row.convert(value)
        return converted is None or converted == value_of(plain, row.to)
    return key.startswith(("optimizer.", "scheduler."))


@pytest.mark.parametrize(
    ("values", "becomes"),
    [
        ({"flops_profiler": {"enabled": False, "profile_step": 1}, "wandb": {"enabled": False, "group": "a"}}, {}),
        ({ZERO: {"stage": 3, "mics_shard_size": -1}}, {"zero.shard_size": None}),
        ({"wall_clock_breakdown": True}, {"log.every": 10, "log.breakdown": True}),
        ({"wall_clock_breakdown": True, "steps_per_print": 3}, {"log.every": 3}),
        ({"wall_clock_breakdown": False}, {"log.every": 0}),
    ],
    ids=str,
)
def test_what_a_file_leaves_out_or_switches_off(values: dict[str, Any], becomes: dict[str, Any]) -> None:
    config, notes = from_deepspeed(values)
    assert {name: value_of(config, name) for name in becomes} == becomes and notes == []


def test_a_null_is_no_contradiction_of_the_training_arguments() -> None:
    auto = auto_values(clip_norm=1.0, micro_batch=2, accumulation=1, dp=1)
    values = {"gradient_clipping": None, "train_micro_batch_size_per_gpu": 2}
    assert from_deepspeed(values, auto, must_match=True)[0].optimizer.clip_norm == 1.0


def test_a_whole_file_as_people_have_it(tmp_path: Path) -> None:
    values = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
        },
        ZERO: {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "none", "pin_memory": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    (tmp_path / "ds.json").write_text(json.dumps(values))
    auto = auto_values(
        hidden_size=1024, micro_batch=2, accumulation=4, dp=8, lr=2e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1,
        clip_norm=1.0, fp16=False, bf16=True, warmup_steps=10, total_steps=100,
    )  # fmt: skip
    config, _ = read_config(tmp_path / "ds.json", auto)
    assert config.precision.dtype == "bf16" and not config.keeps_dtype and config.decay == "all"
    assert config.zero.bucket_mb == pytest.approx(1024**2 * 4 / 1e6)
    assert config.zero.prefetch == 1 and config.zero.persistence_threshold == 10240
    assert config.optimizer.lr == 2e-5 and config.optimizer.beta2 == 0.98 and config.optimizer.clip_norm == 1.0
    assert config.schedule is not None and config.schedule.total_num_steps == 100
    sizes = batch_sizes(config, 8)
    assert (sizes.global_batch, sizes.micro_batch, sizes.accumulation) == (64, 2, 4)
    # The same file without the arguments: every "auto" by name.
    with pytest.raises(ConfigError) as refused:
        read_config(tmp_path / "ds.json")
    assert str(refused.value).count("='auto' stands for nothing here") == 17
    # And where file and arguments differ.
    values["gradient_clipping"] = 0.5
    with pytest.raises(ConfigError, match=r"gradient_clipping=0\.5, but the training arguments say 1\.0"):
        from_deepspeed(values, auto, must_match=True)


FAULTS = [
    ({"zero_optimisation": {"stage": 1}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization.stage'?"),
    ({ZERO: {"stage": 1, "reduce_bucket_sise": 5e8}}, f"did you mean '{ZERO}.reduce_bucket_size'?"),
    ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, "unknown key 'optimizer.params.learning_rate'"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both true; switch one of them off"),
    ({ZERO: {"stage": 2, "offload_param": {"device": "cpu"}}}, "at stage 3 only; use stage 3"),
    ({ZERO: {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "use stage 1, 2 or 3"),
    ({ZERO: {"stage": 1, "offload_optimizer": {"device": "nvme"}}}, "needs zero_optimization.offload_optimizer"),
    ({"gradient_clipping": -1}, "gradient_clipping=-1.0 is negative; use 0 for none"),
    ({ZERO: {"reduce_bucket_size": 0.5}}, "reduce_bucket_size=0.5 must be a whole number"),
    ({"fp16": {"enabled": True, "initial_scale_power": 2000}}, "Input should be less than or equal to 1099511627776"),
    ({ZERO: {"stage": 4}}, "zero.stage = 4"),
    ({ZERO: {"overlap_comm": 1}}, "overlap_comm=1 must be true or false"),
    ({"aio": {"block_size": "x"}}, "aio.block_size='x' must be a whole number"),
    ({"aio": 7}, "aio=7 must be an object of settings"),
    ({"aio": {"single_submit": 3}}, "aio.single_submit=3 must be true or false"),
    ({"aio": {"blocksize": 3}}, "unknown key 'aio.blocksize'; did you mean 'block_size'?"),
    ({ZERO: {"sub_group_size": -5}}, "sub_group_size=-5 is negative; use 0 for none"),
    ({ZERO: {"sub_group_size": math.inf}}, "sub_group_size=inf must be a whole number"),
    ({ZERO: {"contiguous_gradients": "yes"}}, "contiguous_gradients='yes' must be true or false"),
    ({"optimizer": {"type": "Lamb"}}, "is not made from a file; use one of Adam, AdamW"),
    ({"optimizer": {"type": "Lion"}}, "'Lion' is not in torch.optim; use one of"),
    ({"optimizer": {"type": "Muon"}}, "is not made from a file; use one of Adam, AdamW"),
    *(({"optimizer": {"type": kind}}, "sends compressed gradients") for kind in ("OneBitAdam", "ZeroOneAdam")),
    ({"optimizer": {"type": "OneBitLamb"}}, "DeepSpeed 0.19.8 has removed it too; use one of"),
    *(({"optimizer": {"type": f"Mu{kind}"}}, "initialize() one of mup.optim") for kind in ("Adam", "AdamW", "SGD")),
    ({"train_batch_size": -1}, "train_batch_size=-1 is less than 1; leave it out"),
    ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, "FusedAdam(..., bias_correction=False)"),
    ({"flops_profiler": {"enabled": 1}}, "flops_profiler.enabled=1 must be true or false"),
    ({"activation_checkpointing": {"profile": 3}}, "activation_checkpointing.profile=3 must be true or false"),
    ({"bf16": {"enabled": "auto"}}, "bf16.enabled='auto' stands for nothing here"),
    ({"train_batch_size": math.inf}, "train_batch_size=inf must be a whole number"),
    ({ZERO: {"stage": 3, "zero_hpz_partition_size": "8"}}, "zero_hpz_partition_size='8' must be a whole number"),
    ({"optimizer": {"type": "Adamm"}}, "did you mean 'Adam'"),
    ({"scheduler": {"type": "WarmupDecayLR", "params": {}}}, "needs scheduler.params.total_num_steps"),
    (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 5, "warmup_num_steps": 10}}},
        "total_num_steps=5 is less than warmup_num_steps=10",
    ),
    (
        {"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
        "train_batch_size=30 is no multiple of train_micro_batch_size_per_gpu=4 x gradient_accumulation_steps=2, for "
        "any number of ranks; use 24 or 32",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), FAULTS, ids=lambda value: str(value)[:60])
def test_a_contradiction_is_one_error_with_the_numbers(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_deepspeed(values)
    assert message in str(refused.value)


def test_a_file_may_come_as_text_in_base_64() -> None:
    """As DeepSpeed takes it; a path that is not there stays one."""
    text = base64.urlsafe_b64encode(json.dumps({ZERO: {"stage": 2}}).encode()).decode()
    assert from_deepspeed(text)[0].zero.stage == 2
    for other in ("none.json", "nonsense", text[:-2], base64.urlsafe_b64encode(b"[1]").decode()):
        with pytest.raises(ConfigError, match=f"{other} cannot be read: No such file"):
            from_deepspeed(other)


def test_a_key_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.json").write_text('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}')
    with pytest.raises(ConfigError, match="'bf16' stands there twice"):
        read_config(tmp_path / "twice.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_config(tmp_path / "broken.json")


def test_the_two_kinds_of_dictionary_are_told_apart() -> None:
    assert is_deepspeed({"optimizer": {"type": "AdamW"}}) and not is_deepspeed({"optimizer": {"lr": 1.0}})
    assert is_deepspeed({"train_batch_size": 1}) and not is_deepspeed({"accumulation": 1})
    with pytest.raises(ConfigError, match="train_batch_size are DeepSpeed's keys, zero are ours"):
        is_deepspeed({"train_batch_size": 1, "zero": {}})


def test_the_table_in_the_documentation_is_the_codes() -> None:
    assert {key: row.here for key, row in MEANINGS.items()} == {key: here(key) for key in MEANINGS}
    assert [line for line in LINES if line.startswith("- ")] == list(lists())


def test_the_table_has_the_type_of_every_key_that_is_read() -> None:
    names = {bool: "bool", int: "int", float: "float", str: "string"}
    for key, (kind, default, meaning, _) in MEANINGS.items():
        row: Any = row_of(key)
        declared = getattr(row, "kind", None)
        if isinstance(declared, Mapping):
            declared = declared.get(key.rpartition(".")[2])
        elif key not in KEYS:
            declared = None
        # A whole number may be written as a float there.
        near = {"int": {"int", "float"}, "float": {"float"}}.get(kind, {kind})
        assert not isinstance(declared, type) or declared is object or names[declared] in near, key
        of_kind: dict[str, Any] = {"bool": bool, "int": int, "float": float, "string": str, "list": (list, str)}
        assert default in (None, "auto") or isinstance(default, of_kind[kind]), key
        assert meaning.endswith(".") and len(meaning) > 8, key


@pytest.mark.parametrize("key", [k for k, m in MEANINGS.items() if m.default is not None])
def test_the_default_of_a_key_may_be_written_out(key: str) -> None:
    """What a silent file means, said: read without a fault, but for the names of what is refused here."""
    default = MEANINGS[key].default
    if default == "auto" or key in ("optimizer.params.lr",) or key.startswith(("optimizer.params", "scheduler.params")):
        return
    config, _ = from_deepspeed(nested({f"{ZERO}.stage": 3, key: default}))
    assert config.zero.stage == (0 if key == f"{ZERO}.stage" else 3)
