"""``deepspeed.zero``: building a model for stage 3, and looking at its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_ds.engine import Engine
from megatron_ds.integrations.deepspeed.links import engine_of


class Init(contextlib.nullcontext[None]):
    """Around the building of a model: does nothing, so that every parameter gets the values it would get anyway.

    ``initialize()`` shards the model. One that is larger than a rank's memory is built in
    ``megatron_ds.empty_parameters()`` instead.
    """

    def __init__(self, module: nn.Module | None = None, *arguments: Any, **keywords: Any):
        super().__init__()


@contextlib.contextmanager
def GatheredParameters(  # noqa: N802
    params: nn.Parameter | Iterable[nn.Parameter] | nn.Module,
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """The parameters are whole inside, on all ranks.

    Args:
        modifier_rank: what this rank writes into them holds on all ranks afterwards. None: writes are lost.
    """
    given = params.parameters() if isinstance(params, nn.Module) else params
    parameters = [given] if isinstance(given, nn.Parameter) else list(given)
    of_engines: dict[Engine, list[nn.Parameter]] = {}
    for parameter in parameters if enabled else ():
        if (engine := engine_of(parameter)) is not None:  # of no engine: whole already
            of_engines.setdefault(engine, []).append(parameter)
    own = [parameter for of_engine in of_engines.values() for parameter in of_engine]
    with contextlib.ExitStack() as whole:
        for engine, of_engine in of_engines.items():
            whole.enter_context(engine.gathered(of_engine, write=modifier_rank is not None))
        yield
        if modifier_rank and dist.is_initialized():  # the engine takes rank 0's
            with torch.no_grad():
                for parameter in own:
                    dist.broadcast(parameter.data, modifier_rank)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Does nothing: a parameter that another module's forward touches is gathered for it there and then."""
