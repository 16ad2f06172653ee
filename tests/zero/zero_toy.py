"""A small float64 model with every awkward parameter, its plain-torch reference, and the same run through ZeRO."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from whole_rule import Normalized, NormalizedRule

from megatron_ds import comm
from megatron_ds.comm.local.shared_buffers import LocalBuffers
from megatron_ds.config import OffloadConfig, OptimizerConfig, ZeroConfig
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.optim.clip import clip_coefficient
from megatron_ds.optim.factory import ConfigRule
from megatron_ds.optim.rule import RulesByName, UpdateRule
from megatron_ds.shard import ShardSpec
from megatron_ds.testing import device_of_rank
from megatron_ds.zero.optimizer import ZeroOptimizer

SAMPLES = 12
WHOLE = ("inputs", "tied", "rare", "output")
BY_SGD = ("t*d", "bias", "out*")  # the tied matrix, a vector, and a matrix; as patterns
STEPS = 4


@dataclass(frozen=True)
class Case:
    stage: int = 1
    accumulate: int = 1
    optimizer: str = "adamw"
    clip: float = 0.0
    overlap: bool = True
    bucket_mb: float = 0.0006
    shared_memory: bool = True
    keep_whole: bool = False
    offload: str = "none"
    ratio: float = 1.0
    persistence_threshold: int = 12  # stage 3: 11 elements and fewer stay whole
    weights: str = "none"  # how they, and gradients, are sent
    gradients: str = "none"
    secondary: int | None = None
    shard_size: int | None = None

    @property
    def rule(self) -> OptimizerConfig | UpdateRule:
        """``"adamw"``, ``"sgd"``, ``"mixed"``: SGD at twice the rate for :data:`BY_SGD`, AdamW for the others; or
        ``"whole"``: a rule of whole matrices for all of them but those, AdamW for the others."""

        def config(name: str) -> OptimizerConfig:
            return OptimizerConfig(name=name, lr=0.05, momentum=0.9, weight_decay=0.1)  # type: ignore[arg-type]

        if self.optimizer in ("adamw", "sgd"):
            return config(self.optimizer)
        if self.optimizer == "whole":
            return RulesByName({**dict.fromkeys(WHOLE, NormalizedRule()), "*": ConfigRule(config("adamw"))})
        sgd = ConfigRule(config("sgd"), lr_factor=2.0)
        return RulesByName({**dict.fromkeys(BY_SGD, sgd), "*": ConfigRule(config("adamw"))})


class Toy(nn.Module):
    """Maps ``[n, 6]`` to a loss summed over samples; every fourth sample uses ``rare``, and none ``never``."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))

        self.empty = parameter(0, 4)
        self.inputs = parameter(6, 11)
        self.scale = parameter(1)
        self.never = parameter(3)
        self.tied = parameter(11, 11)
        self.tied_again = self.tied
        self.frozen = parameter(11)
        self.frozen.requires_grad_(False)
        self.rare = parameter(2, 11)
        self.bias = parameter(11)
        self.output = parameter(11, 7)
        for name, tensor in self.named_parameters():
            tensor.shard = ShardSpec(name, tuple(tensor.shape), weight_decay=tensor.dim() > 1)  # type: ignore[attr-defined]

    def forward(self, samples: torch.Tensor, numbers: list[int]) -> torch.Tensor:
        hidden = torch.tanh(samples @ self.inputs) @ self.tied + self.bias * self.frozen
        hidden = torch.tanh(hidden * self.scale) @ self.tied_again.t() + self.empty.sum()
        chosen = [row for row, number in enumerate(numbers) if number % 4 == 0]
        loss = (torch.tanh(hidden) @ self.output).square().sum()
        if chosen:
            loss = loss + (hidden[chosen] @ self.rare.t()).square().sum()
        return loss / 100


def samples_of(step: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64).to(dtype)


def reference(case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Gradient norms and final parameters of one process, plain autograd and torch.optim's unfused loop."""
    return _reference(case.optimizer, case.clip)


@cache
def _reference(rule: str, clip: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = Toy()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_others = {"adamw": (), "sgd": tuple(trainable), "mixed": ("tied", "bias", "output"), "whole": WHOLE}

    def groups(of_others: bool) -> list[dict[str, Any]]:
        mine = [p for name, p in trainable.items() if (name in by_others[rule]) == of_others]
        return [
            {"params": [p for p in mine if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in mine if p.dim() <= 1], "weight_decay": 0.0},
        ]

    adamw = torch.optim.AdamW(groups(False), lr=0.05, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    others: torch.optim.Optimizer = torch.optim.SGD(groups(True), lr=0.05, momentum=0.9, foreach=False)
    if rule == "whole":
        others = Normalized([trainable[name] for name in WHOLE], 0.05)
    norms = []
    for step in range(STEPS):
        for parameter in trainable.values():
            parameter.grad = torch.zeros_like(parameter)
        model(samples_of(step), list(range(SAMPLES))).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), clip or math.inf)
        norms.append(norm.item())
        for optimizer, factor in ((adamw, 1.0), (others, 2.0 if rule == "mixed" else 1.0)):
            for group in optimizer.param_groups:
                group["lr"] = factor * 0.05 / (step + 1)
            optimizer.step()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


def train(case: Case, mesh: Mesh) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same through ZeroOptimizer on ``mesh.data``: rank r of W takes every W-th micro-batch."""
    model = Toy().to(mesh.device)
    offload = OffloadConfig()
    if case.offload != "none":
        path = tempfile.gettempdir() if case.offload == "nvme" else None
        offload = OffloadConfig(device=case.offload, path=path, ratio=case.ratio)  # type: ignore[arg-type]
    zero = ZeroOptimizer(
        model.named_parameters(),
        mesh,
        ZeroConfig(
            stage=case.stage,  # type: ignore[arg-type]
            bucket_mb=case.bucket_mb,
            overlap=case.overlap,
            keep_whole=case.keep_whole,
            **({"persistence_threshold": case.persistence_threshold} if case.stage == 3 else {}),
            quantized_weights=case.weights,  # type: ignore[arg-type]
            quantized_gradients=case.gradients,  # type: ignore[arg-type]
            secondary_size=case.secondary,
            shard_size=case.shard_size,
            offload_optimizer=offload,
            offload_parameters=offload if case.stage == 3 else OffloadConfig(),
        ),
        case.rule,
        shared_memory=case.shared_memory,
        root=model,
    )
    can_share = mesh.data.size > 1 and on_cpu(mesh) and hasattr(os, "memfd_create")
    as_it_is = case.weights == case.gradients == "none" and case.secondary is None
    assert shares_memory(zero) == (case.shared_memory and case.stage >= 1 and can_share and as_it_is)
    norms = []
    for step in range(STEPS):
        zero.start_step()
        samples = samples_of(step).to(mesh.device)
        micro_batches = torch.arange(SAMPLES).tensor_split(case.accumulate * mesh.data.size)[
            mesh.data.rank :: mesh.data.size
        ]
        assert len(micro_batches) == case.accumulate
        for number, indices in enumerate(micro_batches):
            loss = model(samples[indices.to(mesh.device)], indices.tolist())
            zero.start_backward(number == len(micro_batches) - 1)
            loss.backward()
            zero.end_backward()
        zero.finish_gradients()
        squared = comm.all_reduce(zero.norm_squared(), mesh.world)
        norms.append(squared.sqrt().item())
        zero.step(0.05 / (step + 1), clip_coefficient(squared, case.clip))
    zero.close()
    return norms, {name: p.detach().clone().cpu() for name, p in model.named_parameters()}


def shares_memory(zero: ZeroOptimizer) -> bool:
    return isinstance(zero._buffers[0], LocalBuffers)


def on_cpu(mesh: Mesh) -> bool:
    return mesh.device.type == "cpu"


def train_cases(cases: list[Case]) -> list[Any]:
    """Run on a rank: every case on a mesh of data-parallel ranks, with overlap and without."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    mesh = Mesh.create(MeshShape(dp=world), device_of_rank(rank, world))
    return [(train(case, mesh), train(replace(case, overlap=False), mesh)) for case in cases]
