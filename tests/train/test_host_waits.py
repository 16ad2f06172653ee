"""How often the host waits for the device in a run, its lines and metrics included: once a step, whatever is set.

A run on the meta device, the way that CUDA goes, where each look at a number is counted.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from step_runs import configuration

from megatron_ds.data.gpt_dataset import SyntheticDataset
from megatron_ds.data.loader import BatchLoader
from megatron_ds.kernels import registry
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.models.gpt import GPTTask
from megatron_ds.train.build import build
from megatron_ds.train.callbacks import default_callbacks
from megatron_ds.train.loop import Loop
from megatron_ds.train.metrics import Speedometer
from megatron_ds.train.output import Output

sys.path.append(str(Path(__file__).parents[1] / "models"))
from launches import counted

SETTINGS: dict[str, dict[str, Any]] = {
    "fp16": {"precision": {"dtype": "fp16"}},
    "no clipping": {"optimizer": {"clip_norm": 0.0, "ema_decay": 0.9}},
    "muon": {"optimizer": {"name": "muon"}},
    "dropout": {"model": {"hidden_dropout": 0.1, "logit_softcap": 30.0}, "train": {"label_smoothing": 0.1}},
    "stage 2": {"zero": {"stage": 2}},
    "late": {"train": {"late_check": True}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_waits_once_a_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"precision": {"dtype": "bf16"}, **SETTINGS[name]}
    sections["train"] = {"steps": 3, "global_batch": 2, **sections.get("train", {})}
    sections["model"] = {"num_layers": 1, **sections.get("model", {})}
    off = {"log": {"tensorboard": False}, "checkpoint": {"save_at_end": False}}
    config = configuration(**sections, **off).model_copy(update={"output": str(tmp_path)})
    mesh = Mesh.described(MeshShape(), 0)
    with registry.meta_as("cuda"):
        parts = build(config, mesh, GPTTask(config))
    result = parts.step._result  # of ones, which is all that is known here, the wish to stop among them
    monkeypatch.setattr(parts.step, "_result", lambda *arguments: replace(result(*arguments), stop=False))
    output = Output(tmp_path)
    callbacks = default_callbacks(config, mesh, parts.executor, output)
    loader = BatchLoader(SyntheticDataset(61, 16), 2, 1, prefetch=0)
    loop = Loop(config, mesh, parts, loader, output, Speedometer(1.0, 1, None), callbacks=callbacks)
    waits = counted(lambda: loop.run()).waits
    assert (loop.step, loop.skipped, len(output.metrics.read_text().splitlines())) == (3, 0, 3)
    assert waits == (0 if config.train.late_check else 3)
