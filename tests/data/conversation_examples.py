"""Two conversations, one in ShareGPT's words, and how they are preprocessed."""

from __future__ import annotations

from megatron_ds.data.parts import PreprocessOptions
from megatron_ds.data.source_text import SourceOptions

CHATS: list[list[dict[str, str]]] = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Hé!"},
    ],
    [
        {"from": "human", "value": "1+1"},
        {"from": "gpt", "value": "2"},
        {"from": "human", "value": "+1"},
        {"from": "gpt", "value": "3"},
    ],
]
OPTIONS = PreprocessOptions("bytes", source=SourceOptions("messages", conversations=True), chat_template="chatml")
