"""Fine-tune SDXL's UNet, or LoRA adapters of it, on images with captions, with ZeRO on one GPU or many.

    python examples/finetune_sdxl.py --dry_run                    # which cards it fits; nothing is read or allocated
    torchrun --nproc-per-node 4 examples/finetune_sdxl.py --pretrained_model_name_or_path sdxl \\
        --train_data_dir photos --output_dir runs/sdxl --mixed_precision bf16 --gradient_checkpointing --use_ema

Images and captions (x.txt beside x.jpg, metadata.jsonl with file_name and text, tar shards or an image set of
`datasets`) are encoded once, by all ranks, into OUTPUT_DIR/latents. Afterwards OUTPUT_DIR is a folder of which
StableDiffusionXLPipeline.from_pretrained generates; with --rank it holds LoRA weights for pipe.load_lora_weights.
Options have the names and meanings of the scripts of diffusers. SIGTERM or Ctrl-C saves; --resume_from_checkpoint
latest goes on, bit for bit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import megatron_ds
from megatron_ds.config.diffusion import ObjectiveConfig
from megatron_ds.config.engine import EngineConfig
from megatron_ds.data.latent_writer import CacheSettings
from megatron_ds.data.loader import BatchLoader
from megatron_ds.engine import Engine
from megatron_ds.engine.assemble import mesh_of, start_ranks
from megatron_ds.errors import ConfigError, multiples_around
from megatron_ds.integrations.sdxl import gpu_memory, latents, model_folders, training
from megatron_ds.models.samplers import PREDICTIONS
from megatron_ds.models.sdxl import denoising_loss, objective_of
from megatron_ds.train.launch import RankInfo, run_main

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
UNET = Path(__file__).parent / "configs" / "diffusion" / "sdxl-unet.json"
DTYPES = {"no": ("fp32", torch.float32), "fp16": ("fp16", torch.float16), "bf16": ("bf16", torch.bfloat16)}
SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
EMA_DECAY = 0.9999
RESOLUTION = 1024
ENCODE_BATCH = 8


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    model, data, training_, optimizer, run = map(
        parser.add_argument_group, ("model", "images", "training", "optimizer", "run")
    )
    add = model.add_argument
    add("--pretrained_model_name_or_path", default=SDXL, help="pipeline: a folder, or a name on the Hub; %(default)s")
    add("--pretrained_vae_model_name_or_path", type=Path, help="folder of another VAE; default: the pipeline's")
    add("--rank", type=int, help="train LoRA adapters of this rank alone; default: the whole UNet")
    add("--use_ema", action="store_true", help=f"average the weights, decay {EMA_DECAY}, and save the average")
    add = data.add_argument
    add("--train_data_dir", type=Path, help="images with captions")
    add("--resolution", type=int, help=f"height and width in pixels; {RESOLUTION}, or that of --latents")
    add("--center_crop", action="store_true", help="crop in the middle; default: anywhere, by seed and image")
    add("--random_flip", action="store_true", help="mirror half of the images, by seed and image")
    add("--latents", type=Path, help="folder that tools/cache_latents.py wrote, instead of --train_data_dir")
    add("--encode_batch_size", type=int, help=f"images a rank encodes at once; {ENCODE_BATCH}")
    add = training_.add_argument
    add("--train_batch_size", type=int, default=16, help="images a forward pass on one rank; %(default)s")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes a step; %(default)s")
    add("--gradient_checkpointing", action="store_true", help="compute activations again in the backward pass")
    add("--mixed_precision", choices=list(DTYPES), default="no", help="of weights; masters are fp32; %(default)s")
    add("--max_train_steps", type=int, help="steps; default: by --num_train_epochs")
    add("--num_train_epochs", type=int, default=100, help="times that every image is seen; %(default)s")
    add("--snr_gamma", type=float, help="min-SNR weights clamped at this, often 5; default: none")
    add("--noise_offset", type=float, default=0.0, help="of a number that a channel's pixels share; %(default)s")
    add("--prediction_type", choices=list(PREDICTIONS.values()), help="default: the pipeline's")
    add("--proportion_empty_prompts", type=float, default=0.0, help="images trained without text; %(default)s")
    add("--seed", type=int, default=0, help="of order, noise, times, crops and adapters; %(default)s")
    add = optimizer.add_argument
    add("--learning_rate", type=float, default=1e-4, help="%(default)s")
    add("--lr_scheduler", choices=SCHEDULES, default="constant", help="%(default)s")
    add("--lr_warmup_steps", type=int, default=500, help="steps, for every schedule but constant; %(default)s")
    add("--adam_beta1", type=float, default=0.9, help="%(default)s")
    add("--adam_beta2", type=float, default=0.999, help="%(default)s")
    add("--adam_weight_decay", type=float, default=1e-2, help="%(default)s")
    add("--adam_epsilon", type=float, default=1e-8, help="%(default)s")
    add("--max_grad_norm", type=float, default=1.0, help="%(default)s")
    add("--zero_stage", type=int, choices=range(4), default=2, help="ZeRO stage; %(default)s")
    add = run.add_argument
    add("--output_dir", type=Path, default=Path("runs/sdxl"), help="%(default)s")
    add("--checkpointing_steps", type=int, default=500, help="steps between checkpoints; %(default)s")
    add("--checkpoints_total_limit", type=int, help="newest to keep; default: all")
    add("--resume_from_checkpoint", help="latest, or a checkpoint's path or name")
    add("--log_every", type=int, default=10, help="steps between lines; %(default)s")
    add("--dry_run", "--dry-run", action="store_true", help="bytes of 1 to 8 GPUs, and which cards that fits")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError before anything is read."""
    faults = []
    if args.resolution is not None and (args.resolution < 8 or args.resolution % 8):
        near = multiples_around(args.resolution, 8)
        faults.append(f"--resolution {args.resolution}: a latent of SDXL is 8 pixels wide; use {near}")
    if not 0 <= args.proportion_empty_prompts < 1:
        faults.append(f"--proportion_empty_prompts {args.proportion_empty_prompts} is no share; use 0 to less than 1")
    if (args.train_data_dir is None) == (args.latents is None) and not args.dry_run:
        faults.append("give either --train_data_dir, images with captions, or --latents, what they were encoded to")
    if args.latents is not None and args.encode_batch_size is not None:
        faults.append("--encode_batch_size: nothing is encoded with --latents; leave it out")
    for name in ("train_batch_size", "gradient_accumulation_steps", "checkpointing_steps"):
        if getattr(args, name) < 1:
            faults.append(f"--{name} {getattr(args, name)}: use 1 or more")
    for name in ("rank", "max_train_steps", "checkpoints_total_limit", "encode_batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            faults.append(f"--{name} {getattr(args, name)}: use 1 or more, or leave it out")
    if faults:
        raise ConfigError("; ".join(faults))


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """AdamW as in the scripts of diffusers, which decays every parameter."""
    return {
        "micro_batch": args.train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "seed": args.seed,
        "decay": "all",
        "zero": {"stage": args.zero_stage},
        "optimizer": {
            "lr": args.learning_rate,
            "beta1": args.adam_beta1,
            "beta2": args.adam_beta2,
            "eps": args.adam_epsilon,
            "weight_decay": args.adam_weight_decay,
            "clip_norm": args.max_grad_norm,
            "ema_decay": EMA_DECAY * args.use_ema,
        },
        "precision": {"dtype": DTYPES[args.mixed_precision][0]},
        "log": {"every": args.log_every},
    }


def dry_run(args: argparse.Namespace) -> str:
    from diffusers import UNet2DConditionModel

    local = Path(args.pretrained_model_name_or_path) / "unet" / "config.json"
    config = json.loads((local if local.exists() else UNET).read_text())
    with torch.device("meta"):
        unet = model_folders.prepare_unet(UNet2DConditionModel.from_config(config), args.rank, checkpointing=False)
    torch.nn.Module.to(unet, DTYPES[args.mixed_precision][1])
    again, side = args.gradient_checkpointing, args.resolution or RESOLUTION
    activations = gpu_memory.activation_bytes(unet, args.train_batch_size, side, again)
    what = f"{args.train_batch_size} x {side} x {side} pixels, "
    what += "with" if again else "without"
    return gpu_memory.memory_table(unet, engine_settings(args), activations, f"{what} --gradient_checkpointing")


def main(place: RankInfo) -> int:
    args = options()
    check(args)
    if args.dry_run:
        print(dry_run(args))
        return 0
    settings = EngineConfig.model_validate(engine_settings(args))
    base = model_folders.local_folder(args.pretrained_model_name_or_path)
    vae = args.pretrained_vae_model_name_or_path or base / "vae"
    scheduler = model_folders.scheduler_config(base)
    objective = objective_of(scheduler, args.prediction_type, args.snr_gamma, args.proportion_empty_prompts)
    training.check_output(args.output_dir, args.resume_from_checkpoint, objective)
    mesh = mesh_of(settings, start_ranks(settings))
    if args.latents is None:
        crop: Any = "centre" if args.center_crop else "random"
        side = args.resolution or RESOLUTION
        images = CacheSettings(side, 8, 1.0, crop, args.random_flip, args.seed, args.encode_batch_size or ENCODE_BATCH)
        folder = args.output_dir / "latents"
        cache = latents.write_latents(mesh, args.train_data_dir, base, vae, images, folder)
    else:
        given = {
            "resolution": args.resolution,
            "crop": "centre" if args.center_crop else None,
            "flip": args.random_flip or None,
        }
        wanted = {name: value for name, value in given.items() if value is not None}
        cache = latents.open_latents(args.latents, base, vae, wanted)
    zeros = model_folders.zeros_for_empty_prompts(base)
    block = args.train_batch_size
    samples = latents.samples_of(cache, args.seed, objective.condition_dropout, zeros, args.noise_offset, block)
    identity = training.identity_of(objective, args.seed, cache, args.rank, block)
    resume = training.checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint, identity)
    together = block * args.gradient_accumulation_steps * mesh.data.size
    steps = args.max_train_steps or -(-args.num_train_epochs * len(samples) // together)
    rate = training.learning_rates(args.lr_scheduler, args.learning_rate, args.lr_warmup_steps, steps)
    torch.manual_seed(args.seed)  # of adapters
    unet = model_folders.load_unet(base, args.rank, args.gradient_checkpointing)
    wide = {name: parameter.data for name, parameter in unet.named_parameters() if parameter.requires_grad}
    loss = denoising_loss(objective, DTYPES[args.mixed_precision][1])
    engine = megatron_ds.initialize(unet, settings, lr_scheduler=rate, loss=loss, mesh=mesh)
    if args.mixed_precision != "no":
        engine.set_parameters(wide)  # master weights are what was loaded, and not rounded
    del wide
    if mesh.rank == 0:
        print(f"{len(samples)} images, {together} a step, {steps} steps\n{engine.bytes_table()}", flush=True)
    loader = BatchLoader(samples, together, block, mesh.data.rank, mesh.data.size)
    limits = training.Limits(steps, args.checkpointing_steps, args.checkpoints_total_limit)
    if training.train(engine, loader, limits, args.output_dir, identity, resume):
        save(engine, base, args, objective)
    return 0


def save(engine: Engine, base: Path, args: argparse.Namespace, objective: ObjectiveConfig) -> None:
    if args.rank is not None:
        model_folders.save_lora(engine, args.output_dir, args.use_ema)
        text = f"pipe.load_lora_weights({str(args.output_dir)!r}) loads the adapters"
    else:
        kind = PREDICTIONS[objective.prediction]
        vae = args.pretrained_vae_model_name_or_path
        model_folders.save_pipeline(engine, base, args.output_dir, args.use_ema, kind, vae)
        text = f"StableDiffusionXLPipeline.from_pretrained({str(args.output_dir)!r}) loads the pipeline"
    if engine.mesh.rank == 0:
        print(text)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
