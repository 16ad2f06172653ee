"""Of an answer, what stands in a template's generation blocks alone is learnt: ``transformers``' assistant mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_chat_ids import CHATS, bpe_folder, theirs

from megatron_ds.data.chat import ChatTemplate, encode, load_template
from megatron_ds.data.chat_records import BadConversation
from megatron_ds.data.tokenizers import load_tokenizer

ANSWER = (  # reasoning is shown, and not learnt
    "{% if '</r>' in m.content %}{{ m.content.split('</r>')[0] + '</r>' }}{% endif %}"
    "{% generation %}{{ m.content.split('</r>')[-1] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
)
WHOLE = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\\n' }}{% if m.role == 'assistant' %}ANSWER"
    "{% else %}{{ m.content }}<|im_end|>{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("answer", [ANSWER, WHOLE])
def test_the_mask_is_that_of_transformers(tmp_path: Path, answer: str) -> None:
    folder = bpe_folder(tmp_path / "t", TEMPLATE.replace("ANSWER", answer))
    tokenizer, reference = load_tokenizer(folder), theirs(folder)
    template = load_template(None, str(folder), tokenizer.special)
    for chat in CHATS:
        expected = reference.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        (rendering,) = template.renderings(chat)
        ids, mask = encode(tokenizer, rendering)
        assert ids.tolist() == expected["input_ids"] and mask.tolist() == expected["assistant_masks"]
        assert mask.any()


def test_a_block_whose_text_is_changed_is_refused() -> None:
    source = "{% set a %}{% generation %}b{% endgeneration %}{% endset %}{{ a | length }}"
    source = "{{ messages[0].content }}{% if messages | length > 1 %}" + source + "{% endif %}"
    with pytest.raises(BadConversation, match="changes what its generation blocks wrote"):
        ChatTemplate(source).renderings(CHATS[1])


def test_an_answer_that_is_no_target_has_no_block(tmp_path: Path) -> None:
    """Blocks take from what is learnt, and add nothing."""
    folder = bpe_folder(tmp_path / "t", TEMPLATE.replace("ANSWER", WHOLE))
    tokenizer = load_tokenizer(folder)
    chat: list[dict[str, Any]] = json.loads(json.dumps(CHATS[0]))
    chat[1]["weight"] = 0
    (rendering,) = load_template(None, str(folder), tokenizer.special).renderings(chat)
    ids, mask = encode(tokenizer, rendering)
    assert tokenizer.decode(ids[np.flatnonzero(mask)]) == chat[3]["content"] + "<|im_end|>"
