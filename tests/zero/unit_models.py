"""A float64 model of blocks with every habit that stage 3 has to cope with, trained on one process and on ranks."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from whole_rule import Normalized, NormalizedRule

from megatron_ds import comm
from megatron_ds.config import OffloadConfig, OptimizerConfig, ZeroConfig
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.optim.factory import ConfigRule
from megatron_ds.optim.rule import RulesByName, UpdateRule
from megatron_ds.shard import ShardSpec
from megatron_ds.testing import device_of_rank
from megatron_ds.zero.memory import TransientParameters
from megatron_ds.zero.optimizer import ZeroOptimizer

STEPS = 3
SAMPLES = 12
WIDTH = 8
LR = 0.05


class Block(nn.Module):
    def __init__(self, spread: int):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, spread), nn.Linear(spread, WIDTH)

    def forward(self, x: Tensor, *, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """The block's output, and a second output that only some callers use."""
        hidden = torch.tanh(self.up(self.norm(x))) * scale
        return x + self.down(hidden), hidden.mean()


class Awkward(nn.Module):
    """Token ids ``[n, s]`` to a loss summed over samples.

    The head is the embedding's table, used outside of its module; block 1 runs twice; block 2 is recomputed, block 3
    too, in the older way; block 4 is frozen; block 5 runs in some steps only; ``tiny`` is smaller than the ranks;
    ``deep`` holds a unit that holds a unit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block(6 + i) for i in range(6))
        self.blocks[4].requires_grad_(False)
        self.tiny = nn.Parameter(torch.ones(1))
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.deep = nn.ModuleDict({"outer": nn.ModuleList([Block(5), Block(7)]), "alone": nn.Linear(WIDTH, WIDTH)})

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        x = self.embedding(tokens)
        x, _ = self.blocks[0](x)
        x, extra = self.blocks[1](x)
        x, _ = self.blocks[1](x, scale=self.tiny)
        x, _ = checkpoint(self.blocks[2], x, use_reentrant=False)
        x, _ = checkpoint(self.blocks[3], x, use_reentrant=True)
        x, _ = self.blocks[4](x)
        if step % 2 == 0:
            x, _ = self.blocks[5](x)
        for block in self.deep["outer"]:
            x, _ = block(x)
        x = self.deep["alone"](x)
        logits = F.linear(x, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten(), reduction="sum") + extra * len(tokens)


def model() -> Awkward:
    torch.manual_seed(7)
    made = Awkward().double()
    for name, parameter in made.named_parameters():
        parameter.shard = ShardSpec(name, tuple(parameter.shape), weight_decay=parameter.dim() > 1)  # type: ignore[attr-defined]
    return made


def tokens_of(step: int) -> Tensor:
    return torch.randint(0, 11, (SAMPLES, 5), generator=torch.Generator().manual_seed(step))


def plain(rules: str = "adamw") -> dict[str, Tensor]:
    """One process, torch alone, with one optimizer or with one for matrices and one for all else."""
    made = model()
    trained = [p for p in made.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    betas = (0.9, 0.95)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(matrices, LR, betas, weight_decay=0.1, foreach=False)]
    if rules == "whole":
        optimizers = [Normalized([p for p in matrices if p.numel()], LR)]
    if rules == "adamw":
        optimizers.append(torch.optim.AdamW(others, LR, betas, weight_decay=0.0, foreach=False))
    else:
        optimizers.append(torch.optim.SGD(others, 0.5 * LR, momentum=0.9, foreach=False))
    for step in range(STEPS):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        (made(tokens_of(step), step) / SAMPLES).backward()
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach() for name, p in made.named_parameters()}


@dataclass(frozen=True)
class Setting:
    stage: int = 3
    shared_memory: bool = True
    prefetch: int = 1
    keep_whole: bool = False
    overlap: bool = True
    accumulate: int = 1
    shard_size: int | None = None
    offload: str = "none"
    threshold: int = 1
    rules: str = "adamw"


def rule_of(rules: str) -> OptimizerConfig | UpdateRule:
    """``"adamw"``, ``"mixed"``: AdamW for matrices and SGD with momentum, at half the rate, for all else; or
    ``"whole"``: a rule of whole matrices, and that SGD."""
    adamw = OptimizerConfig(lr=LR, weight_decay=0.1)
    if rules == "adamw":
        return adamw
    sgd = ConfigRule(OptimizerConfig(name="sgd", momentum=0.9), lr_factor=0.5)
    return RulesByName(
        {"*.bias": sgd, "*norm*": sgd, "tiny": sgd, "*": NormalizedRule() if rules == "whole" else ConfigRule(adamw)}
    )


def optimizer_of(made: nn.Module, mesh: Mesh, setting: Setting) -> ZeroOptimizer:
    offload = OffloadConfig()
    if setting.offload != "none":
        path = tempfile.gettempdir() if setting.offload == "nvme" else None
        offload = OffloadConfig(device=setting.offload, path=path)  # type: ignore[arg-type]
    of_stage_3: dict[str, Any] = {"prefetch": setting.prefetch, "persistence_threshold": setting.threshold}
    config = ZeroConfig(
        stage=setting.stage,  # type: ignore[arg-type]
        bucket_mb=0.001,
        overlap=setting.overlap,
        keep_whole=setting.keep_whole,
        shard_size=setting.shard_size,
        offload_optimizer=offload,
        offload_parameters=offload if setting.stage == 3 else OffloadConfig(),
        **(of_stage_3 if setting.stage == 3 else {}),
    )
    return ZeroOptimizer(
        made.named_parameters(),
        mesh,
        config,
        rule_of(setting.rules),
        shared_memory=setting.shared_memory,
        root=made,
    )


def steps(made: Awkward, zero: ZeroOptimizer, mesh: Mesh, accumulate: int, which: range) -> int:
    """Train; the largest number of elements that were whole at one time, as seen by every block's forward."""
    peak = 0

    def look(*_: Any) -> None:
        nonlocal peak
        transient = [b.parameters for b in zero._all if isinstance(b.parameters, TransientParameters)]
        peak = max(peak, sum(buffer.whole.numel() for buffer in transient if buffer.is_whole))

    hooks = [block.register_forward_pre_hook(look) for block in made.modules() if isinstance(block, Block)]
    for step in which:
        zero.start_step()
        mine = tokens_of(step).tensor_split(accumulate * mesh.data.size)[mesh.data.rank :: mesh.data.size]
        for number, tokens in enumerate(mine):
            loss = made(tokens.to(mesh.device), step) / SAMPLES
            zero.start_backward(number == len(mine) - 1)
            loss.backward()
            zero.end_backward()
        zero.finish_gradients()
        comm.all_reduce(zero.norm_squared(), mesh.world)
        zero.step(LR)
    for hook in hooks:
        hook.remove()
    return peak


def mesh_of_ranks(device: str | None = None) -> Mesh:
    world = dist.get_world_size()
    return Mesh.create(MeshShape(dp=world), torch.device(device) if device else device_of_rank(dist.get_rank(), world))


def train(settings: list[Setting], device: str | None = None) -> list[tuple[dict[str, Tensor], int]]:
    """Inside a job: the parameters after training with each setting, and the peak of :func:`steps`.

    ``device``: one for all ranks, instead of that of :func:`device_of_rank`.
    """
    mesh = mesh_of_ranks(device)
    found = []
    for setting in settings:
        try:
            found.append(_train(setting, mesh))
        except Exception as error:
            raise RuntimeError(f"{setting} failed") from error
    return found


def _train(setting: Setting, mesh: Mesh) -> tuple[dict[str, Tensor], int]:
    made = model().to(mesh.device)
    zero = optimizer_of(made, mesh, setting)
    peak = steps(made, zero, mesh, setting.accumulate, range(STEPS))
    with zero.gathered(made.parameters()):
        parameters = {name: p.detach().clone().cpu() for name, p in made.named_parameters()}
    zero.close()
    return parameters, peak
