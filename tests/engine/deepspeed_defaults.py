"""What DeepSpeed itself does where a file is silent, and its schedulers update by update.

Runs in the peers' environment. Standard input is a JSON list of ``scheduler`` sections with an optimizer's ``lr``;
standard output, in its last line, a JSON object:

    rates, betas: of each section, the values of its first updates
    defaults: of the configuration's keys; of the optimizers' arguments
    keys: of each key, its kind of value in JSON ("" where it is not declared) and its default
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

UPDATES = 45


def rates(section: dict[str, Any]) -> tuple[list[float], list[Any]]:
    from deepspeed.runtime import lr_schedules

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=section["lr"])
    scheduler = getattr(lr_schedules, section["type"])(optimizer, **section["params"])
    found: list[float] = []
    betas: list[Any] = []
    for _ in range(UPDATES):
        found.append(float(optimizer.param_groups[0]["lr"]))
        betas.append(list(optimizer.param_groups[0]["betas"]))
        scheduler.step()
    return found, betas


def defaults() -> dict[str, Any]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime.config import DeepSpeedConfig

    silent = DeepSpeedConfig({"train_batch_size": 1, "fp16": {"enabled": True}})
    fp16 = silent.float16_config
    names = ("lr", "betas", "eps", "weight_decay", "bias_correction")
    classes = {"FusedAdam": FusedAdam, "DeepSpeedCPUAdam": DeepSpeedCPUAdam}
    return {
        "gradient_clipping": silent.gradient_clipping,
        "zero_optimization.stage": int(silent.zero_optimization_stage),
        **{
            f"fp16.{name}": getattr(fp16, name)
            for name in ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
        },
        **{
            f"{name}.{key}": inspect.signature(cls.__init__).parameters[key].default
            for name, cls in classes.items()
            for key in names
        },
    }


# Where DeepSpeed declares no fields but reads a dictionary: the attribute of what it has read, by key.
READ = {
    **{
        key: key
        for key in (
            "gradient_clipping", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op",
            "managed_gradient_accumulation", "disable_allgather", "disable_python_gc", "dump_state",
            "memory_breakdown", "dataloader_drop_last", "log_level",
        )
    },
    "communication_data_type": "communication_data_type",
    "data_types.grad_accum_dtype": "grad_accum_dtype",
    "data_types.param_dtype": "param_dtype",
    "data_types.buffer_dtype": "buffer_dtype",
    "data_types.keep_in_fp32_modules": "keep_in_fp32_modules",
    "optimizer.legacy_fusion": "optimizer_legacy_fusion",
    **{
        f"activation_checkpointing.{key}": f"activation_checkpointing_config.{key}"
        for key in (
            "partition_activations", "contiguous_memory_optimization", "cpu_checkpointing", "number_checkpoints",
            "synchronize_checkpoint_boundary", "profile",
        )
    },
}  # fmt: skip
KINDS = {bool: "bool", int: "int", float: "float", str: "string", list: "list"}


def keys() -> dict[str, tuple[str, Any]]:
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    zero = "zero_optimization"
    sections: dict[str, Any] = {
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "compile": CompileConfig,
        zero: DeepSpeedZeroConfig,
        f"{zero}.offload_param": DeepSpeedZeroOffloadParamConfig,
        f"{zero}.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        f"{zero}.leaf_module": DeepSpeedZeroLeafModuleConfig,
    }
    found: dict[str, tuple[str, Any]] = {}
    for section, model in sections.items():
        for name, field in model.model_fields.items():
            key = f"{section}.{field.alias or name}"
            if key in sections:
                continue
            default = field.get_default(call_default_factory=True)
            default = getattr(default, "value", default)
            declared = field.annotation
            kind = KINDS.get(declared, "")
            found[key] = (kind, default if isinstance(default, (bool, int, float, str, list)) else None)
    silent = DeepSpeedConfig({"train_batch_size": 1})
    for key, path in READ.items():
        value: Any = silent
        for part in path.split("."):
            value = getattr(value, part)
        found[key] = ("" if isinstance(value, str) else KINDS.get(type(value), ""), value)
    return found | inside(silent)


# Attributes of what DeepSpeed has read that are no keys of a file.
NO_KEYS = ("autotuning.start_step", "autotuning.end_step", "expert_parallel._load_balance_coeff_explicit")


def inside(silent: Any) -> dict[str, tuple[str, Any]]:
    """The keys of the sections that are one value to the reader, from what DeepSpeed makes of an empty file."""
    from deepspeed.comm.config import CommsLoggerConfig

    sections = {
        "flops_profiler": silent.flops_profiler_config,
        "comms_logger": CommsLoggerConfig(),
        "timers.throughput": silent.timers_config,
        **{name: getattr(silent.monitor_config, name) for name in ("tensorboard", "wandb", "comet", "csv_monitor")},
        "autotuning": silent.autotuning_config,
        "hybrid_engine": silent.hybrid_engine,
        "tensor_parallel": silent.tensor_parallel_config,
        "expert_parallel": silent.expert_parallel_config,
        "pipeline": silent.pipeline,
        "checkpoint": silent.checkpoint_config,
        "datastates_ckpt": silent.datastates_config,
        "data_efficiency": silent.data_efficiency_config,
        "aio": silent.aio_config,
    }
    found: dict[str, tuple[str, Any]] = {}
    for name, section in sections.items():
        for key, value in members(name, section):
            if key not in NO_KEYS:
                plain = value is None or isinstance(value, (bool, int, float, str, list))
                found[key] = ("" if isinstance(value, str) else KINDS.get(type(value), ""), value if plain else None)
    return found


def members(name: str, section: Any) -> Iterator[tuple[str, Any]]:
    fields = getattr(type(section), "model_fields", {})
    values = section if isinstance(section, dict) else vars(section)
    for key, value in values.items():
        own = f"{name}.{(fields[key].alias if key in fields else None) or key}"
        if (isinstance(value, dict) and value) or hasattr(type(value), "model_fields"):
            yield from members(own, value)
        else:
            yield own, value


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    both = [rates(section) for section in json.load(sys.stdin)]
    found = {
        "rates": [of_one[0] for of_one in both],
        "betas": [of_one[1] for of_one in both],
        "defaults": defaults(),
        "keys": keys(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
