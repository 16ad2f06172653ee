"""Real photographs as small files, and encoders by configuration: what tests of images read."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import torch
from PIL import Image

CROPS = ((0, 0, 120, 90), (100, 50, 220, 140), (300, 100, 390, 220), (200, 200, 320, 320), (0, 300, 90, 420))
"""Left, upper, right, lower: three shapes."""
WORDS = ("<pad>", "<end>", "<unknown>", "a", "temple", "with", "roofs", *map(str, range(5)))
"""What text encoders know."""


def photograph(name: str) -> Image.Image:
    """``china`` or ``flower``, of scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    with Image.open(Path(spec.origin).parent / "datasets" / "images" / f"{name}.jpg") as image:
        return image.copy()


def encoded(image: Image.Image, format: str = "PNG", **settings: object) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **settings)
    return content.getvalue()


def damage(path: Path) -> Path:
    """Zeros within a PNG, which nobody notices before the pixels are decoded."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    return path


def write_classes(folder: Path) -> Path:
    """Ten images in two classes: PNG and JPEG, wide, high and square."""
    for name, format in (("china", "PNG"), ("flower", "JPEG")):
        (folder / name).mkdir(parents=True)
        for number, box in enumerate(CROPS):
            suffix = {"PNG": "png", "JPEG": "jpg"}[format]
            (folder / name / f"{number}.{suffix}").write_bytes(encoded(photograph(name).crop(box), format))
    return folder


def write_captions(folder: Path) -> Path:
    """Five images with a caption each."""
    folder.mkdir(parents=True)
    for number, box in enumerate(CROPS):
        (folder / f"{number}.png").write_bytes(encoded(photograph("china").crop(box)))
        (folder / f"{number}.txt").write_text(f"a temple with {number} roofs\n")
    return folder


def write_vae(folder: Path, scale: float = 0.25, seed: int = 0, shift: float | None = 0.5) -> Path:
    """An ``AutoencoderKL`` that makes 4 channels of a quarter of the height and width."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=scale,
        shift_factor=shift,
    )
    vae.save_pretrained(folder)
    return folder


def write_text_encoder(folder: Path, width: int, projected: bool, seed: int = 0) -> Path:
    """A CLIP text encoder of 2 layers, with a tokenizer of words in the same folder."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=width,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=0,
    )
    make = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    make(config).save_pretrained(folder)
    return _write_tokenizer(folder, 8)


def write_t5(folder: Path, width: int) -> Path:
    """A T5 encoder of 2 layers, likewise; its tokenizer takes texts of any length."""
    import transformers

    torch.manual_seed(2)
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=2 * width, num_layers=2, num_heads=2, pad_token_id=0
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return _write_tokenizer(folder, None)


def _write_tokenizer(folder: Path, most: int | None) -> Path:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>", model_max_length=most
    )
    fast.save_pretrained(folder)
    return folder


def sd3_encoders(folder: Path) -> list[Path]:
    """Two CLIP encoders and a T5 as Stable Diffusion 3 has them: texts of [8 + T5's tokens, 48], pooled [40]."""
    return [
        write_text_encoder(folder / "clip-1", 16, projected=True),
        write_text_encoder(folder / "clip-2", 24, projected=True, seed=1),
        write_t5(folder / "t5", 48),
    ]
