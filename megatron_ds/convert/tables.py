"""The families of Hugging Face's models that convert, and conversion with them.

Every rule is an exact pair of transforms; that they are also the right ones only equal logits can prove, and
``tests/checkpoint/test_hf_logits.py`` compares those with ``transformers``' own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_ds.convert import hugging_face
from megatron_ds.convert.architecture import Architecture
from megatron_ds.convert.bert_table import BERTS
from megatron_ds.convert.gpt_table import BLOOM, FALCON, GPT2, GPT_NEOX, GPTJ, OPT
from megatron_ds.convert.layouts import global_shapes
from megatron_ds.convert.llama_table import LLAMAS
from megatron_ds.data.tokenizer_base import Tokenizer

__all__ = ["ARCHITECTURES", "export_hf", "global_shapes", "import_hf"]

ARCHITECTURES: tuple[Architecture, ...] = (GPT2, *LLAMAS, BLOOM, GPT_NEOX, GPTJ, OPT, FALCON, *BERTS)


def export_hf(
    checkpoint: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = False,
    warn: Callable[[str], None] | None = None,
    average: bool | None = None,
) -> Path:
    """:func:`megatron_ds.convert.hugging_face.export_hf` with the architectures of this module."""
    return hugging_face.export_hf(
        checkpoint, out_dir, ARCHITECTURES, dtype, tokenizer, progress, warn=warn, average=average
    )


def import_hf(
    hf_dir: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    vocab_multiple: int | None = None,
    progress: bool = False,
    warn: Callable[[str], None] | None = None,
) -> Path:
    """:func:`megatron_ds.convert.hugging_face.import_hf` with the architectures of this module."""
    return hugging_face.import_hf(hf_dir, out_dir, ARCHITECTURES, dtype, vocab_multiple, progress, warn=warn)
