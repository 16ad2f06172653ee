"""Stands in for ``import deepspeed``: its names and its semantics, on this library's engine.

::

    from megatron_ds.integrations import deepspeed

    engine, optimizer, loader, scheduler = deepspeed.initialize(args, model, model_parameters=..., config="ds.json")
    for batch in loader:
        engine.backward(engine(batch))
        engine.step()

Nothing of DeepSpeed is imported or needed. A loss is divided by ``gradient_accumulation_steps``, gradients are averaged
over the ranks, the learning rate schedule steps with each update, and several backward passes may come before a
``step()``. Checkpoints are this library's, in a folder ``DIRECTORY/TAG``. What there is no counterpart for is an error
that names it.
"""

from megatron_ds.integrations.deepspeed import checkpointing, comm, ops, pipe, utils, zero
from megatron_ds.integrations.deepspeed.comm import init_distributed
from megatron_ds.integrations.deepspeed.engine import DeepSpeedEngine, DeepSpeedOptimizer
from megatron_ds.integrations.deepspeed.hf import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from megatron_ds.integrations.deepspeed.pipe import PipelineModule
from megatron_ds.integrations.deepspeed.start import add_config_arguments, initialize

__all__ = [
    "DeepSpeedEngine",
    "DeepSpeedOptimizer",
    "HfDeepSpeedConfig",
    "PipelineModule",
    "add_config_arguments",
    "checkpointing",
    "comm",
    "init_distributed",
    "initialize",
    "is_deepspeed_zero3_enabled",
    "ops",
    "pipe",
    "utils",
    "zero",
]
