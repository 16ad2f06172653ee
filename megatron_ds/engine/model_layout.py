"""The bytes of any rank that would train a user's model, without memory, processes or weights."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from megatron_ds.config.engine import EngineConfig, validate_engine
from megatron_ds.engine.assemble import name_parameters
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.optim.factory import as_rule
from megatron_ds.train.build import DTYPES
from megatron_ds.zero.allocate import data_axes
from megatron_ds.zero.layout import ZeroLayout
from megatron_ds.zero.units import choose_units, describe


def layout_of(model: nn.Module, config: EngineConfig, ranks: int) -> ZeroLayout:
    """The ZeRO layout of each of ``ranks`` data-parallel ranks, as :func:`initialize` makes it with the same settings.

    Args:
        model: on any device, the meta device included; it is left as it is.
        config: with an optimizer of its own; one of the caller's may keep other state.

    Raises:
        ConfigError: the configuration is wrong for so many ranks.
    """
    validate_engine(config, ranks)
    parameters = list(name_parameters(model, config.decay == "all").values())
    mesh = Mesh.described(MeshShape.for_world(ranks), 0)
    axes = {over: (shard.size, copies.size) for over, (shard, copies) in data_axes(mesh, config.zero).items()}
    rule = as_rule(config.optimizer, parameters, mesh.tp)
    units = choose_units(config.zero, axes[()][0], model, ())
    infos = describe(parameters, units, config.zero.persistence_threshold, rule, {}, {})
    if not config.keeps_dtype:
        dtype = DTYPES[config.precision.dtype]
        infos = [replace(info, dtype=dtype) if p.is_floating_point() else info for info, p in zip(infos, parameters)]
    return ZeroLayout.plan(infos, config.zero, axes)
