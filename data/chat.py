"""Conversations as text: a chat template, and which parts of the text the model shall learn to say.

A template is Jinja, as Hugging Face tokenizers carry one; it runs in Jinja's sandbox. The parts are found by
rendering: what an assistant's message adds to the text of the messages before it (with the generation prompt, the
words that lead the assistant in) is learnt, all else is context.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import xxhash

from megatron_ds.errors import DataError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Other names of roles, as in ShareGPT's files (``{"from": "human", "value": ...}``)."""


class BadConversation(Exception):
    """Why a record is no conversation that the template can show."""


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text; ``learn``: the model is trained to predict it."""

    text: str
    learn: bool


class ChatTemplate:
    """Args: ``source``, the Jinja text; ``special``, names that it may use (``bos_token``, ``eos_token``).

    Raises:
        DataError: not valid Jinja.
    """

    def __init__(self, source: str, special: dict[str, str] | None = None):
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda shape: datetime.now().strftime(shape)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template is not valid Jinja: {error}") from None
        self._special = special or {}
        self.fingerprint = xxhash.xxh3_64_hexdigest(json.dumps([source, self._special]).encode())

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        import jinja2

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self._special
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadConversation(f"the chat template refuses it: {error}") from None

    def segments(self, messages: list[dict[str, Any]]) -> list[Segment]:
        """The text of a conversation in pieces; joined, they are ``render(messages)``.

        Raises:
            BadConversation: the template refuses it, or changes what it wrote of earlier messages when later ones
                come, so that no part of the text belongs to a message.
        """
        whole = self.render(messages)
        pieces: list[Segment] = []
        at = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.render(messages[:i], True), self.render(messages[: i + 1])
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= at):
                raise BadConversation(f"the chat template writes message {i} otherwise when others follow it")
            pieces += [Segment(whole[at : len(before)], False), Segment(whole[len(before) : len(after)], True)]
            at = len(after)
        pieces.append(Segment(whole[at:], False))
        return [piece for piece in pieces if piece.text]


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """A list of ``{"role": ..., "content": ...}`` from a record's value, or of ShareGPT's ``from`` and ``value``.

    Raises:
        BadConversation: it is neither, or no message is the assistant's.
    """
    if not isinstance(value, list) or not value:
        raise BadConversation(f"not a list of messages but {type(value).__name__}")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadConversation(f"message {number} is a {type(message).__name__}, not an object")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadConversation(f"message {number} has no role and content that are strings, but {sorted(message)}")
        messages.append({**message, "role": ROLES.get(role, role), "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise BadConversation("no message is the assistant's")
    return messages


def load_template(spec: str | None, tokenizer: str) -> ChatTemplate:
    """The template that ``spec`` names: ``chatml``, a file, or None for the one in the tokenizer's folder.

    Raises:
        DataError: there is none; the message says what to give.
    """
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    config = _read_config(folder)
    special = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        special[name] = str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
    if spec == "chatml":
        return ChatTemplate(CHATML, special)
    if spec is not None:
        path = Path(spec)
        if not path.is_file():
            raise DataError(f"chat template {spec!r} is not a file; give a Jinja file, or 'chatml'")
        return ChatTemplate(path.read_text(encoding="utf-8"), special)
    if (folder / "chat_template.jinja").is_file():
        return ChatTemplate((folder / "chat_template.jinja").read_text(encoding="utf-8"), special)
    source = config.get("chat_template")
    if isinstance(source, list):  # several named ones
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if isinstance(source, str):
        return ChatTemplate(source, special)
    raise DataError(f"the tokenizer {tokenizer} has no chat template; give a Jinja file, or 'chatml'")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    return config if isinstance(config, dict) else {}
