"""Text generated at ZeRO stage 3: as many forward passes on each rank, where ranks gather weights from one another."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

from torch import nn

from megatron_ds.zero.optimizer import ZeroOptimizer


def generate_together(model: nn.Module, zero: ZeroOptimizer) -> None:
    """Give ``synced_gpus=True`` to ``generate`` of `transformers` where its caller says nothing of it.

    A rank whose texts have ended then goes on until those of all ranks have, as at DeepSpeed's stage 3. Without it that
    rank would be in the loop's next collective while the others wait for it in a gather. Within one host each rank
    generates for itself.
    """
    if zero.gatherer is None or not zero.gatherer.takes_all_ranks():
        return
    for module in model.modules():
        method = getattr(type(module), "generate", None)
        if callable(method) and "synced_gpus" in (signature := inspect.signature(method)).parameters:
            module.generate = _together(module, signature, zero)


def _together(module: nn.Module, signature: inspect.Signature, zero: ZeroOptimizer) -> Any:
    def generate(self: Any, *arguments: Any, **keywords: Any) -> Any:
        said = signature.bind(self, *arguments, **keywords).arguments
        # A copy of the model shares this function, and has its weights whole.
        if self is module and said.get("synced_gpus") is None and zero.gatherer is not None:
            keywords["synced_gpus"] = zero.gatherer.takes_all_ranks()
        return type(self).generate(self, *arguments, **keywords)

    return MethodType(generate, module)
