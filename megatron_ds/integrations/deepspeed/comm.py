"""``deepspeed.comm``: the names of ``torch.distributed``, and how the ranks are started."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from megatron_ds.config.engine import EngineConfig
from megatron_ds.engine.assemble import start_ranks
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import init_process_group


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: Any = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Starts ``torch.distributed`` from torchrun's environment, or as a group of one process without it.

    Args:
        dist_backend: ``"gloo"`` computes on CPUs; else the devices decide.
        timeout: a ``timedelta``, of a collective.

    Raises:
        ConfigError: ranks that would come another way than from the environment.
    """
    if dist.is_initialized() or dist_init_required is False:
        return
    if init_method not in (None, "env://") or rank >= 0 or world_size >= 0:
        raise ConfigError(
            f"init_method={init_method!r}, rank={rank}, world_size={world_size}: ranks come from torchrun's "
            "environment; start the script with torchrun and leave these arguments out"
        )
    limit = {} if timeout is None else {"timeout": timeout.total_seconds()}
    settings = EngineConfig(device="cpu" if dist_backend == "gloo" else "auto", **limit)
    place = start_ranks(settings)
    if place.world_size == 1:  # an engine needs none, but a script asks it for its rank
        backend = "nccl" if place.device(settings.device).type == "cuda" else "gloo"
        init_process_group(backend, 0, 1, dist.HashStore(), settings.timeout)


def get_local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def get_world_group() -> Any:
    return dist.group.WORLD


def __getattr__(name: str) -> Any:
    return getattr(dist, name)
