"""Fine-tune a UNet of diffusers with ZeRO-2 to draw digits, on one process or many.

    python examples/finetune_diffusers_unet.py --output runs/digits
    torchrun --nproc-per-node 2 examples/finetune_diffusers_unet.py --steps 500 --sample digits.png

The images are scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which come with it. A small UNet2DModel learns
to predict the noise in them (DDPM), from --model, a folder that an earlier run wrote, or from scratch. Afterwards the
output is a folder that UNet2DModel.from_pretrained loads; --sample draws some digits with it.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

import megatron_ds
from megatron_ds.train.launch import RankInfo, run_main

NOISE = DDPMScheduler(num_train_timesteps=200)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a UNet2DModel to go on from; default: from scratch")
    parser.add_argument("--output", default="runs/digits", help="folder for the model; %(default)s")
    parser.add_argument("--config", help="DeepSpeed JSON or TOML file; default: ZeRO-2")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps; %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="images a step, over all ranks; %(default)s")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate; %(default)s")
    parser.add_argument("--sample", help="PNG file for 16 digits drawn by the model")
    return parser.parse_args()


def make_model(folder: str | None) -> UNet2DModel:
    if folder:
        return UNet2DModel.from_pretrained(folder)
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def loss_of(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The mean squared error of the noise that the model sees in noisy images."""
    noisy = NOISE.add_noise(batch["images"], batch["noise"], batch["times"])
    return (model(noisy, batch["times"]).sample - batch["noise"]).square().mean()


def draw(model: UNet2DModel, path: str, device: torch.device) -> None:
    from matplotlib import image

    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    NOISE.set_timesteps(50)
    for time in NOISE.timesteps:
        images = NOISE.step(model(images, time).sample, time, images).prev_sample
    grid = images.view(2, 8, 8, 8).permute(0, 2, 1, 3).reshape(16, 64)
    image.imsave(path, grid.clamp(-1, 1).cpu().numpy(), cmap="gray", dpi=100)


def main(place: RankInfo) -> int:
    args = options()
    model = make_model(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    config = args.config or {"zero": {"stage": 2}, "optimizer": {"clip_norm": 1.0}, "log": {"every": 20}}
    engine = megatron_ds.initialize(model, config, optimizer, loss=loss_of)
    digits = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    random, replicas, accumulation = torch.Generator().manual_seed(0), engine.mesh.data, engine.sizes.accumulation
    losses = []
    for _ in range(args.steps):
        # All ranks draw the same batch, and each takes its micro-batches of it.
        chosen = digits[torch.randint(len(digits), (args.batch,), generator=random)]
        noise = torch.randn(chosen.shape, generator=random)
        times = torch.randint(len(NOISE), (args.batch,), generator=random)
        batch = {"images": chosen, "noise": noise, "times": times}
        cut = {name: tensor.chunk(replicas.size * accumulation) for name, tensor in batch.items()}
        own = range(replicas.rank * accumulation, (replicas.rank + 1) * accumulation)
        losses.append(engine.train_batch([{name: parts[i] for name, parts in cut.items()} for i in own]).loss)
    engine.save_pretrained(args.output)
    if engine.mesh.rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; UNet2DModel.from_pretrained({args.output!r}) loads the model")
        if args.sample:
            with torch.no_grad():
                draw(UNet2DModel.from_pretrained(args.output).to(engine.mesh.device), args.sample, engine.mesh.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
