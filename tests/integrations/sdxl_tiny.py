"""SDXL's classes at a size for tests: the UNet, a pipeline's folder, and made-up rows of a cache of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

SHAPES = {"text": (5, 24), "pooled": (16,)}


def tiny_unet(**values: Any) -> Any:
    """``UNet2DConditionModel`` with every kind of part that SDXL's has: a million parameters, the same ones always."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1),
        "attention_head_dim": (2, 4),
        "norm_num_groups": 8,
        "cross_attention_dim": SHAPES["text"][1],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": SHAPES["pooled"][0] + 6 * 8,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**{**sizes, **values})


class MadeUpLatents:
    """As a :class:`~megatron_ds.data.latent_cache.LatentCache` of ``number`` rows of 8 x 8 latents."""

    def __init__(self, number: int, std: float = 0.1):
        random = np.random.default_rng(0)
        shapes = {"latents": (4, 8, 8), **SHAPES}
        self._rows: dict[str, npt.NDArray] = {
            name: random.normal(size=(number, *shape)).astype(np.float32) for name, shape in shapes.items()
        }
        self.folder = Path("made up")
        self.empty = {name: np.full((1, *shape), 0.5, np.float32) for name, shape in SHAPES.items()}
        self._rows["latents_std"] = np.full((number, 4, 8, 8), std, np.float32)
        for name, low, high in (("original_size", 16, 99), ("crop_top_left", 0, 9), ("target_size", 16, 17)):
            self._rows[name] = random.integers(low, high, (number, 2))
        self.fields = tuple(self._rows)
        self.buckets = {(8, 8): np.arange(number)}
        self.scale, self.shift, self.identity = 0.5, 0.0, {"images": "made up", "number": number}

    def __len__(self) -> int:
        return len(self._rows["latents"])

    def rows(self, indices: npt.ArrayLike) -> dict[str, npt.NDArray]:
        return {name: array[np.asarray(indices)] for name, array in self._rows.items()}


def save_pipeline(folder: Path, images: int = 16) -> None:
    """A whole ``StableDiffusionXLPipeline``, whose VAE has 2 pixels a latent."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=images,
        scaling_factor=0.3,
    )
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: n for n, token in enumerate([*letters, *(f"{c}</w>" for c in letters), "<s>", "</s>"])}

    def encoder(kind: Any, width: int, **values: Any) -> Any:
        sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        ends = {"bos_token_id": vocabulary["<s>"], "eos_token_id": vocabulary["</s>"], "pad_token_id": 1}
        c = CLIPTextConfig(
            vocab_size=len(vocabulary), max_position_embeddings=SHAPES["text"][0], **sizes, **ends, **values
        )
        return kind(c).eval()

    def tokenizer() -> Any:
        made = CLIPTokenizer(
            vocab=vocabulary, merges=[], unk_token="</s>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        made.model_max_length = SHAPES["text"][0]
        return made

    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoder(CLIPTextModel, 8),
        text_encoder_2=encoder(CLIPTextModelWithProjection, 16, projection_dim=SHAPES["pooled"][0]),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=tiny_unet(),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    ).save_pretrained(folder)
