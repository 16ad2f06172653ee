"""Several update rules for one model."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.config import OptimizerConfig, ZeroConfig
from megatron_ds.errors import ConfigError
from megatron_ds.optim.factory import ConfigRule
from megatron_ds.optim.rule import RuleGroup, RulesByName
from megatron_ds.shard import ShardedDim, ShardSpec
from megatron_ds.zero.buckets import ParameterInfo
from megatron_ds.zero.layout import ZeroLayout


class Whole(ConfigRule):
    """Says that its updates are of whole parameters."""

    def __init__(self) -> None:
        super().__init__(OptimizerConfig())
        self.group = RuleGroup(whole=True)


def parameter(name: str) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.zeros(64))
    made.shard = ShardSpec(name, (64,))  # type: ignore[attr-defined]
    return made


def test_the_first_pattern_that_fits_decides_and_a_bucket_holds_one_group() -> None:
    sgd, adamw = ConfigRule(OptimizerConfig(name="sgd", momentum=0.9)), ConfigRule(OptimizerConfig())
    rules = RulesByName({"a.bias": adamw, "*.bias": sgd, "head": sgd, "*": adamw})
    names = ["a.bias", "b.bias", "head", "body"]
    assert [rules.group_of(name).number for name in names] == [0, 1, 1, 0]
    infos = [ParameterInfo.of(parameter(name), rule=rules) for name in names]
    layout = ZeroLayout.plan(infos, ZeroConfig(), {(): (2, 1)})
    layouts = layout.buckets
    assert [[slot.spec.name for slot in layout.slots] for layout in layouts] == [["head", "b.bias"], ["body", "a.bias"]]
    assert layouts[0].key.rule == RuleGroup(1, ("momentum_buffer",))
    assert layout.bytes().by_kind["optimizer"] == 64 * 4 * (1 + 2)  # a half of two parameters, one and two kinds


class Counted(ConfigRule):
    """Knows how many steps have begun."""

    steps = 0

    def begin_step(self) -> None:
        self.steps += 1


def test_a_step_begins_once_for_each_rule() -> None:
    several, one = Counted(OptimizerConfig()), Counted(OptimizerConfig(name="sgd"))
    RulesByName({"a": several, "b": one, "*": several}).begin_step()
    assert (several.steps, one.steps) == (1, 1)


def test_an_update_of_whole_matrices_needs_them_whole_on_a_rank() -> None:
    made = torch.nn.Parameter(torch.zeros(8, 4))
    made.shard = ShardSpec("w", (16, 4), (ShardedDim(0, "tp", 0, 2),))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"update of w is of whole parameters, .* \[8, 4\] of its \[16, 4\]; .*tp=1"):
        ParameterInfo.of(made, rule=Whole())


def test_a_parameter_without_a_rule_is_refused() -> None:
    rules = RulesByName({"*.bias": ConfigRule(OptimizerConfig()), "head": ConfigRule(OptimizerConfig())})
    with pytest.raises(ConfigError, match=r"no update rule for body, .* none of '\*\.bias', 'head'; add"):
        ParameterInfo.of(parameter("body"), rule=rules)
