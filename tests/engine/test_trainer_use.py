"""What people do with a Trainer besides one run, on the engine: the plain Trainer's numbers, files and best model."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import check
from trainer_more import CASES, STAGE_3, Adapted, configured, everything, frozen_llama, generated, refusals, resumed

from megatron_ds.testing import run_ranks


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-4) and want["losses"]
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-3)
    assert got["eval"] == pytest.approx(want["eval"], rel=1e-4)
    assert got["best"] == want["best"]
    check(([], got["state"]), ([], want["state"]), 2e-4)


def test_a_trainer_is_used_in_many_ways(tmp_path: Path) -> None:
    """On two ranks, at stages 2 and 3; and what two ranks left is taken up by one process."""
    plain = {name: case(str(tmp_path / "plain" / name), None) for name, case in CASES.items()}
    assert plain["best"]["best"] != "checkpoint-4" and plain["best"]["folders"]
    folder = tmp_path / "2"
    for results in run_ranks(everything, 2, str(folder)):
        for name in plain:
            for stage in (2, 3):
                same(results[f"{name} {stage}"], plain[name])
        for stage in (2, 3):
            assert results[f"best {stage}"]["folders"] == plain["best"]["folders"]
        without, with_it, later = results["full eval"]
        assert with_it == without and later != without
        same({**results["resumed 3"], "best": None}, plain["adapted"])
        written, state = results["by itself"]
        assert written.keys() == state.keys() and all(torch.equal(written[name], p) for name, p in state.items())
    start = {name: p for name, p in frozen_llama().named_parameters() if not p.requires_grad}
    assert all(torch.equal(results["frozen 3"]["state"][name], p) for name, p in start.items()) and len(start) > 5
    files = sorted(path.name for path in (folder / "adapted-3" / "checkpoint-4").glob("*.safetensors"))
    assert files == ["adapter_model.safetensors"], files
    weights = load_file(folder / "adapted-3" / "checkpoint-4" / "adapter_model.safetensors")
    assert sorted(weights) == ["lora_down.weight", "lora_up.weight"]
    assert all(torch.equal(value, results["adapted 3"]["state"][name]) for name, value in weights.items())
    (alone,) = run_ranks(resumed, 1, str(tmp_path / "2" / "adapted-3"), {"zero": {"stage": 1}}, Adapted, 2)
    same({**alone, "best": None}, plain["adapted"])  # of two ranks, on one


def test_ranks_generate_together(tmp_path: Path) -> None:
    """Apart: ranks of one host would read one another's weights without a message."""
    tokens = generated(str(tmp_path / "plain"), None)
    assert len({len(row) for row in tokens[:4]}) > 1 and len(tokens[4]) != len(tokens[5])
    for found in run_ranks(generated, 2, str(tmp_path / "2"), STAGE_3, apart=True):
        assert found == tokens


def test_a_configuration_and_the_arguments_go_together(tmp_path: Path) -> None:
    ((plain, named, rates),) = run_ranks(configured, 1, str(tmp_path))
    same(named, plain)
    assert rates == [[pytest.approx(2e-3 * (1 + update / 2))] * 2 for update in range(3)] * 2


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    (found,) = run_ranks(refusals, 1, str(tmp_path))
    assert "save_only_model=True leaves out what load_best_model_at_end" in found["only model"]
    for kind in ("optimizer", "scheduler"):
        assert f"given a {kind} or makes one itself, and the configuration (deepspeed=) has one too" in found[kind]
    assert "learning_rate=0, and the configuration's scheduler" in found["no rate"]
    assert "precision.dtype='fp32', but mixed_precision='bf16'" in found["dtype"]
    assert "optimizer.name='muon' knows the matrices of this library's own models" in found["muon"]
    assert "auto_find_batch_size" in found["batch size"] and "per_device_train_batch_size" in found["batch size"]
    assert "bf16_full_eval=True would cast the model" in found["full eval"] and "bf16=True" in found["full eval"]
    assert "has no engine/" in found["plain"] and "from_pretrained" in found["plain"]


def test_arguments_of_another_library_keep_its_defaults() -> None:
    from transformers import TrainingArguments

    from megatron_ds.integrations import transformers as integration

    @dataclass
    class WithDefaults(TrainingArguments):
        """As TRL's."""

        learning_rate: float = 1e-6
        remove_unused_columns: bool = False
        label_names: list[str] | None = field(default_factory=lambda: ["a"])
        beta: float = 0.1

    @dataclass
    class Both(integration.TrainingArguments, WithDefaults):
        logging_steps: float = 7

    @dataclass
    class Later(Both):
        learning_rate: float = 3e-4

    want = {f.name: (f.default, f.default_factory) for f in fields(WithDefaults)}
    want["logging_steps"] = (7, MISSING)
    assert {f.name: (f.default, f.default_factory) for f in fields(Both)} == want
    assert (Both.learning_rate, Later.learning_rate, integration.TrainingArguments.learning_rate) == (1e-6, 3e-4, 5e-5)
    made = Later("unused", use_cpu=True, deepspeed=STAGE_3, beta=0.2)  # type: ignore[call-arg, arg-type]
    assert (made.engine_config, made.label_names, made.remove_unused_columns) == (STAGE_3, ["a"], False)
    assert (made.learning_rate, made.logging_steps, made.beta) == (3e-4, 7, 0.2)
