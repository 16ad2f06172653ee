"""The classes of ``transformers`` whose models convert.

Every rule is an exact pair of transforms; that they are also the right ones only equal logits can prove, and
``tests/checkpoint/test_hf_logits.py`` compares those with ``transformers``' own.
"""

from __future__ import annotations

from megatron_ds.convert.architecture import Architecture
from megatron_ds.convert.bert_table import BERTS
from megatron_ds.convert.gpt_table import BLOOM, FALCON, GPT2, GPT_NEOX, GPTJ, OPT
from megatron_ds.convert.llama_table import LLAMAS

ARCHITECTURES: tuple[Architecture, ...] = (GPT2, *LLAMAS, BLOOM, GPT_NEOX, GPTJ, OPT, FALCON, *BERTS)
