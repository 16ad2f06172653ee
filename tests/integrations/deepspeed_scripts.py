"""Training scripts in DeepSpeed's style: what they do with ``deepspeed`` they do with any module of its names.

Each returns its losses, learning rates and final weights. ``python deepspeed_scripts.py`` runs them with DeepSpeed
itself, where it is installed, and prints them as JSON: for tests/integrations/test_deepspeed_scripts.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

WIDTH, CLASSES, SAMPLES = 6, 3, 24
LR, WARMUP, CLIP, DECAY = 0.02, 4, 0.2, 0.1
MICRO = 2


class Ran(NamedTuple):
    losses: list[float]
    rates: list[float]
    weights: dict[str, Any]


def net(seed: int, outputs: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, outputs))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(SAMPLES, WIDTH, generator=generator), torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


def config(stage: int, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000,
        **more,
    }


CLASSIFIER: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_num_steps": WARMUP, "warmup_type": "linear", "warmup_max_lr": LR},
    },
}


def classifier(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """Two epochs over ``training_data``, configured by a file that ``args`` names."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(config(stage, 2, **CLASSIFIER)))
        args = deepspeed.add_config_arguments(argparse.ArgumentParser()).parse_args(
            ["--deepspeed", "--deepspeed_config", str(path)]
        )
        args.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        model = net(1, CLASSES).to(dtype)
        samples, labels = data()
        engine, optimizer, loader, scheduler = deepspeed.initialize(
            args=args,
            model=model,
            model_parameters=model.parameters(),
            training_data=torch.utils.data.TensorDataset(samples.to(dtype), labels),
        )
    assert scheduler is not None and optimizer.param_groups
    losses, rates = [], []
    for _ in range(2):
        for batch, target in loader:
            rates.append(engine.get_lr()[0])
            loss = cross_entropy(engine(batch.to(engine.device)), target.to(engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return Ran(losses, rates, weights(engine))


def gan(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """Two engines; two backward passes in a step of one, and one loss through both."""
    generator, discriminator = net(2, WIDTH).to(dtype), net(3, 1).to(dtype)
    engines = []
    for model in (generator, discriminator):
        adam = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.5, 0.9))
        settings = config(stage, gradient_clipping=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings)
        engines.append(engine)
    g, d = engines
    losses = []
    for step in range(4):
        real, noise = gan_batch(step, d.world_size, d.global_rank, dtype)
        d.zero_grad()
        of_real = softplus(-d(real)).mean()
        d.backward(of_real)
        fake = g(noise)
        of_fake = softplus(d(fake.detach())).mean()
        d.backward(of_fake)
        d.step()
        of_generator = softplus(-d(fake)).mean()
        g.backward(of_generator)
        g.step()
        losses.append((of_real + of_fake + of_generator).item())
    found = {f"g.{name}": value for name, value in weights(g).items()}
    return Ran(losses, [], found | {f"d.{name}": value for name, value in weights(d).items()})


def gan_batch(step: int, ranks: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's part of the step's samples and noise."""
    both = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(50 + step)).to(dtype)
    return tuple(both.chunk(ranks, dim=1)[rank])  # type: ignore[return-value]


def layers(deepspeed: Any) -> list[Any]:
    spec = deepspeed.pipe.LayerSpec
    torch.manual_seed(4)
    return [spec(nn.Linear, WIDTH, 16), torch.tanh, spec(nn.Linear, 16, 16), torch.tanh, nn.Linear(16, CLASSES)]


def pipeline(deepspeed: Any, stage: int, dtype: torch.dtype) -> Ran:
    """A list of layers on one stage, by whole batches."""
    model = deepspeed.pipe.PipelineModule(layers(deepspeed), num_stages=1, loss_fn=cross_entropy).to(dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        config=config(stage, 2, optimizer=CLASSIFIER["optimizer"]),
        model_parameters=[p for p in model.parameters() if p.requires_grad],
    )
    samples, labels = (part.chunk(engine.dp_world_size)[engine.global_rank] for part in data())
    pairs = iter(list(zip(samples.to(dtype).split(MICRO), labels.split(MICRO))))
    losses = [engine.train_batch(pairs).item() for _ in range(3 if engine.dp_world_size > 1 else 6)]
    return Ran(losses, [], weights(engine))


def weights(engine: Any) -> dict[str, Any]:
    return {name: value.detach().clone().tolist() for name, value in engine.module_state_dict().items()}


def main() -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    found = {}
    for script in sys.argv[2:]:
        found[script] = globals()[script](deepspeed, int(sys.argv[1]), torch.float32)._asdict()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
