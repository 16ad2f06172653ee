"""The peers: the same model and optimizer under other people's parallelism, each as its documentation shows it.

Every function builds one contestant on this rank and returns its step. The process group (gloo) exists already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain import GPT, adamw, build, training_step
from setting import Workload, decay_groups
from torch import nn

Step = Callable[[], torch.Tensor | None]


def huggingface(w: Workload) -> Step:
    """transformers' GPT-2 with its own loss; attention through SDPA, the tanh GELU as torch's one kernel."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=w.vocab,
        n_positions=w.sequence,
        n_embd=w.hidden,
        n_layer=w.layers,
        n_head=w.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).train()
    optimizer = adamw(model, w)
    # Its loss shifts the labels itself, so it is given the inputs: one target in 256 fewer than the others have.
    return training_step(lambda tokens, _: model(input_ids=tokens, labels=tokens).loss, model, w, optimizer)


def ddp(w: Workload) -> Step:
    model = build(w)
    optimizer = adamw(model, w)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return training_step(wrapped, wrapped, w, optimizer, dist.get_rank(), dist.get_world_size())


def zero_redundancy(w: Workload) -> Step:
    """DDP, with torch's optimizer that keeps each parameter's state on one rank and broadcasts the results."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = build(w)
    optimizer = ZeroRedundancyOptimizer(
        decay_groups(model, w.weight_decay), torch.optim.AdamW, lr=w.lr, betas=w.betas, fused=True
    )
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return training_step(wrapped, wrapped, w, optimizer, dist.get_rank(), dist.get_world_size())


def deepspeed(w: Workload, stage: int, offload: bool = False) -> Step:
    """DeepSpeed on its CPU accelerator. With offload it runs its own CPU Adam, which it compiles at first use."""
    import deepspeed as ds

    model = build(w)
    optimizer = adamw(model, w)
    ranks = dist.get_world_size()
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_batch_size": w.batch,
        "train_micro_batch_size_per_gpu": w.batch // ranks,
        "gradient_clipping": w.clip,
        "zero_optimization": zero,
        "bf16": {"enabled": w.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = ds.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    draw = w.batches(dist.get_rank(), ranks)

    def step() -> torch.Tensor:
        tokens, targets = draw()
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def fsdp2(w: Workload) -> Step:
    """``fully_shard`` on every block and on the whole: ZeRO-3, the only kind it knows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = build(w)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if w.dtype == "bf16" else None)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return training_step(model, model, w, adamw(model, w), dist.get_rank(), dist.get_world_size())


def dtensor_tp(w: Workload, sequence_parallel: bool) -> Step:
    """``parallelize_module`` with column and row plans and a parallel loss, with or without sequence parallelism.

    Plain tensors flow between the modules, as in the tutorial. A rank's share of the fused QKV is cut into thirds
    as if it were whole: another order of the same rows, hence the same model with its heads relabelled.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    model = build(w)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    flow = Shard(1) if sequence_parallel else Replicate()
    plan: dict[str, ParallelStyle] = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=flow),
        "head": ColwiseParallel(input_layouts=flow, output_layouts=Shard(-1), use_local_output=False),
        "blocks.*.qkv": ColwiseParallel(input_layouts=flow),
        "blocks.*.out": RowwiseParallel(output_layouts=flow),
        "blocks.*.up": ColwiseParallel(input_layouts=flow),
        "blocks.*.down": RowwiseParallel(output_layouts=flow),
    }
    if sequence_parallel:
        plan["positions"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0))
        for name in ("norm", "blocks.*.norm1", "blocks.*.norm2"):
            plan[name] = SequenceParallel(use_local_output=True)
    parallelize_module(model, mesh, plan)
    model.head.weight = model.tokens.weight
    return _dtensor_step(model, w)


def _dtensor_step(model: GPT, w: Workload) -> Step:
    """Fused AdamW and the norm want lists of one kind of tensor."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import loss_parallel

    parameters = list(model.parameters())
    kinds = [[p for p in parameters if isinstance(p, DTensor) == kind] for kind in (True, False)]
    groups = [
        {"params": [p for p in kind if (p.dim() >= 2) == decays], "weight_decay": w.weight_decay * decays}
        for kind in kinds
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=w.lr, betas=w.betas, fused=True)
    draw = w.batches()

    def step() -> torch.Tensor:
        tokens, targets = draw()
        with loss_parallel():
            logits = model(tokens)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
        norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
        full = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
        total = torch.linalg.vector_norm(torch.stack(full))
        for kind in kinds:
            if kind:
                nn.utils.clip_grads_with_norm_(kind, w.clip, total)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.full_tensor().detach() if isinstance(loss, DTensor) else loss.detach()

    return step


class Stage(nn.Module):
    """Some consecutive blocks, with the embeddings before the first or the head after the last."""

    def __init__(self, model: GPT, blocks: range):
        super().__init__()
        self.first, self.last = blocks.start == 0, blocks.stop == len(model.blocks)
        self.blocks = nn.ModuleList(copy.deepcopy(model.blocks[i]) for i in blocks)
        if self.first or self.last:
            self.tokens = copy.deepcopy(model.tokens)
        if self.first:
            self.positions = copy.deepcopy(model.positions)
        if self.last:
            self.norm = copy.deepcopy(model.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            x = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight) if self.last else x


def torch_pipeline(w: Workload, split: tuple[int, int], micro_batches: int = 8) -> Step:
    """``torch.distributed.pipelining.Schedule1F1B`` over two stages with the given numbers of layers.

    It knows neither tied embeddings nor a norm over stages: the two copies' gradients are summed, and the norm counts
    the embedding once, by hand.
    """
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank = dist.get_rank()
    stage = Stage(build(w), range(split[0]) if rank == 0 else range(split[0], w.layers))
    optimizer = adamw(stage, w)
    example = torch.zeros(w.batch // micro_batches, w.sequence, dtype=torch.long)
    flowing = torch.zeros(*example.shape, w.hidden, requires_grad=True)
    pipe = PipelineStage(
        stage,
        rank,
        2,
        torch.device("cpu"),
        input_args=(example if rank == 0 else flowing,),
        output_args=(flowing if rank == 0 else torch.zeros(*example.shape, w.vocab),),
    )

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    schedule = Schedule1F1B(pipe, micro_batches, loss_fn=loss_of)
    draw = w.batches()
    own = [p for p in stage.parameters() if rank == 0 or p is not stage.tokens.weight]

    def step() -> torch.Tensor | None:
        tokens, targets = draw()
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(tokens)
        else:
            schedule.step(target=targets, losses=losses)
        dist.all_reduce(stage.tokens.weight.grad)
        squared = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]) ** 2
        dist.all_reduce(squared)
        nn.utils.clip_grads_with_norm_(stage.parameters(), w.clip, squared.sqrt())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean().detach() if losses else None

    return step
