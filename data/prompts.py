"""Prompts to embeddings, by the text encoders that a model's texts were encoded by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds.data.latent_decoder import latents_of
from megatron_ds.data.latent_encoders import TextEncoder, text_identities
from megatron_ds.errors import DataError


def check_text_encoders(
    meta: Mapping[str, Any], folders: Sequence[Path], tokenizers: Sequence[Path], where: object
) -> dict[str, Any]:
    """How the texts were encoded that a checkpoint's model was trained on, by these encoders.

    Raises:
        DataError: the checkpoint does not say it, or they are others.
    """
    texts: dict[str, Any] | None = (latents_of(meta) or {}).get("texts")
    if texts is None:
        raise DataError(f"{where} was not trained on texts of tools/cache_latents.py; what encodes prompts is unknown")
    wanted, given = texts["encoders"], text_identities(folders, tokenizers)
    classes = ", ".join(encoder["class"] for encoder in wanted)
    if len(given) != len(wanted):
        raise DataError(
            f"{where} was trained on texts of {len(wanted)} encoders ({classes}), and not of {len(given)}; give each "
            "with --text-encoder, and its tokenizer with --tokenizer, in this order"
        )
    for folder, words, mine, theirs in zip(folders, tokenizers, given, wanted):
        if differing := [name for name in theirs if mine[name] != theirs[name]]:
            raise DataError(
                f"{words if differing == ['tokenizer'] else folder} is not what {where} was trained on: its "
                f"{' and '.join(differing)} differ; give the folders that tools/cache_latents.py was given, in its "
                f"order ({classes})"
            )
    return texts


def encode_prompts(
    texts: Mapping[str, Any],
    folders: Sequence[Path],
    tokenizers: Sequence[Path],
    prompts: Sequence[str],
    device: torch.device,
) -> dict[str, Tensor]:
    """``text`` fp32 ``[n, tokens, width]`` and ``pooled`` ``[n, width]`` of each prompt, and of none, for guidance,
    ``empty.text`` and ``empty.pooled`` with a first dim 1; on the CPU.

    Args:
        texts: from :func:`check_text_encoders`.
    """
    encoder = TextEncoder(folders, tokenizers, texts["states"], texts["tokens"], device, torch.float32)
    found: dict[str, Tensor] = {}
    for start, wanted in (("", prompts), ("empty.", [""])):
        parts = [encoder.encode([prompt]) for prompt in wanted]
        found |= {start + name: torch.cat([torch.from_numpy(part[name]) for part in parts]) for name in parts[0]}
    return found
