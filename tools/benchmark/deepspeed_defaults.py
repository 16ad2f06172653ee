"""What DeepSpeed itself does where a file is silent, and its schedulers update by update: for tests/engine.

Runs in the peers' environment. Standard input is a JSON list of ``scheduler`` sections with an optimizer's ``lr``;
standard output, in its last line, a JSON object:

    rates, betas: of each section, the values of its first updates
    defaults: of the configuration's keys; of the optimizers' arguments
"""

from __future__ import annotations

import inspect
import json
import os
import sys
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


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    both = [rates(section) for section in json.load(sys.stdin)]
    found = {
        "rates": [of_one[0] for of_one in both],
        "betas": [of_one[1] for of_one in both],
        "defaults": defaults(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
