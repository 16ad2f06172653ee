"""Conversations as text and ids: a chat template, and which tokens the model shall learn to say.

A template is Jinja, as Hugging Face tokenizers carry one; it runs in Jinja's sandbox. What is learnt is found by
rendering: what an assistant's message adds to the text of the messages before it (with the generation prompt, the
words that lead the assistant in) is learnt, all else is context. The ids are those of the whole text, and those of each
prompt are their prefix: what the model is trained on is what it sees when it generates.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.chat_records import BadConversation, is_learnt
from megatron_ds.data.dataset_files import read_manifest
from megatron_ds.data.tokenizer_base import Tokenizer, read_settings
from megatron_ds.errors import DataError, RaisedAs
from megatron_ds.files import checksum, read_text

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Spans = tuple[tuple[int, int], ...]
_GIVEN = "messages", "tools", "add_generation_prompt", "mark_generation", "self"
_REASONING = "reasoning_content", "thinking", "reasoning"
_ASKS_FOR_NONE = re.compile(r"""content['"\])]*\s*(is|==|!=)\s*(not\s+)?none\b""", re.IGNORECASE)


@dataclass(frozen=True)
class Rendering:
    """A text to train on, and its answers: from character ``start`` to ``stop`` the model is trained to predict it."""

    text: str
    answers: Spans
    blocks: Spans | None = None
    """Where the template has generation blocks, what stands in them: of the answers, this alone is learnt."""


class ChatTemplate:
    """A template, or two where a model has one for conversations with tools.

    Args:
        source: the Jinja text.
        special: names that it may use (``bos_token``, ``eos_token``).
        tool_use: what shows a conversation with tools; None: ``source`` does.

    Raises:
        DataError: not valid Jinja.
    """

    def __init__(self, source: str, special: dict[str, str] | None = None, tool_use: str | None = None):
        self._template = _compiled(source)
        self._with_tools = self._template if tool_use is None else _compiled(tool_use)
        self.source, self.tool_use = source, source if tool_use is None else tool_use
        self._special = special or {}
        self._knows_developer = "developer" in self.source or "developer" in self.tool_use
        self._asks_for_none = any(_ASKS_FOR_NONE.search(text) for text in (self.source, self.tool_use))
        sources = [source, self._special, *([] if tool_use is None else [tool_use])]
        self.fingerprint = checksum(json.dumps(sources).encode())

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The text of messages: of a record that is trained on, and of a request that is answered.

        OpenAI's newer role ``developer`` is ``system`` to a template that does not know it. The content of calls alone
        is None for a template that asks for that; others would write the word None. Reasoning has all names that
        ``transformers`` gives it.

        Raises:
            BadConversation: there are tools, and the template shows none; or whatever it does wrong.
        """
        from megatron_ds.data.template_sandbox import render

        if tools and "tools" not in self.tool_use:
            raise BadConversation("the chat template shows no tools; leave tools out, or give a template that does")
        shown = [self._as_known(message) for message in messages]
        given = {"messages": shown, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            # Documents are there, as in transformers, to templates that ask whether they are.
            named = {"documents": None, **self._special, **variables, **given}
            return render(self._template if tools is None else self._with_tools, **named)
        except Exception as error:
            raise BadConversation(f"the chat template refuses it: {str(error) or type(error).__name__}") from None

    def prompt(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a request, up to where its answer begins.

        Args:
            add_generation_prompt: whether the words that lead the assistant in end it.
            continue_final_message: it ends with the text of the last message, which the answer goes on with.
            variables: further ones of the template.

        Raises:
            BadConversation: see :meth:`render`; or the template shows nothing of a message's role, of tool calls or of
                a variable.
        """
        source = self.source if tools is None else self.tool_use
        for name in variables or {}:
            if name in _GIVEN or not re.search(rf"\b{re.escape(name)}\b", source):
                raise BadConversation(f"the chat template has no variable {name!r} to set")

        def render(of: list[dict[str, Any]]) -> str:
            return self.render(of, add_generation_prompt, tools, **(variables or {}))

        text = render(messages)
        # The last of each kind: a request must not cost a rendering for each message.
        kinds = {(message["role"], bool(message.get("tool_calls"))): i for i, message in enumerate(messages)}
        _check_shown(messages, text, list(kinds.values()), render)
        if not continue_final_message:
            return text
        if add_generation_prompt:
            raise BadConversation("continue_final_message needs add_generation_prompt=False: no other answer is begun")
        *before, last = messages
        mark = "\ue000\ue001"
        start, found, after = render([*before, {**last, "content": f"{last['content'] or ''}{mark} "}]).rpartition(mark)
        if not found:
            raise BadConversation("the chat template does not show the last message, which is to be continued")
        return start if after.startswith(" ") else start.rstrip()  # where the template strips texts, of this one too

    def renderings(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> list[Rendering]:
        """The texts of a conversation, so that each answer follows the text that it would follow in generation.

        That is one text, ``render(messages)``, unless the template changes what it wrote of earlier messages when later
        ones come (reasoning that is removed from older answers, for example). Then an answer that the whole text shows
        otherwise is learnt from the text of the conversation up to it.

        Raises:
            BadConversation: the template refuses it or shows no tools, leaves out what answers are given to, or an
                answer does not begin with its generation prompt.
        """
        whole = self.render(messages, tools=tools)
        _check_shown(messages, whole, range(len(messages)), partial(self.render, tools=tools))
        at_whole: list[tuple[int, int]] = []
        others: list[tuple[str, int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not is_learnt(message, i):
                continue
            before, after = self.render(messages[:i], True, tools), self.render(messages[: i + 1], tools=tools)
            if not after.startswith(before):
                raise BadConversation(
                    f"the chat template does not begin the answer of message {i} with its generation prompt"
                )
            if whole.startswith(after):
                at_whole.append((len(before), len(after)))
            else:
                others.append((after, len(before), i + 1))
        found = [Rendering(whole, tuple(at_whole), self._blocks(whole, messages, tools))] if at_whole else []
        while others:
            text, _, stop = others[-1]
            here = tuple((begin, len(after)) for after, begin, _ in others if text.startswith(after))
            found.append(Rendering(text, here, self._blocks(text, messages[:stop], tools)))
            others = [other for other in others if not text.startswith(other[0])]
        return found[::-1]

    def _blocks(self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None) -> Spans | None:
        from megatron_ds.data.template_sandbox import MARKING, cut_marks

        if "endgeneration" not in (self.source if tools is None else self.tool_use):
            return None
        plain, spans = cut_marks(self.render(messages, tools=tools, **{MARKING: True}))
        if plain != text:
            raise BadConversation("the chat template changes what its generation blocks wrote")
        return spans

    def _as_known(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message in words that the template knows."""
        if message.get("content", "") is None and not self._asks_for_none:
            message = {**message, "content": ""}
        if message.get("role") == "developer" and not self._knows_developer:
            message = {**message, "role": "system"}
        thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
        return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _check_shown(
    messages: list[dict[str, Any]], whole: str, which: Sequence[int], render: Callable[[list[dict[str, Any]]], str]
) -> None:
    """Check that the template shows these messages and tool calls.

    Templates skip roles and keys that they do not know. The model would answer, or learn to answer, what it never saw.

    Args:
        whole: the text of all messages.
        which: numbers of the messages that are looked at.

    Raises:
        BadConversation: the text is the same without a message that is not the assistant's, or without calls.
    """
    marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
    try:
        text = render([_marked(message, mark) for message, mark in zip(messages, marks)])
    except BadConversation:
        text = ""
    for i in which:
        message, mark = messages[i], marks[i]
        if mark in text or _marked(message, mark) == message:
            continue
        other = _marked(message, ".") if message["role"] != "assistant" else {**message, "tool_calls": None}
        try:  # a template may change the mark, or show other things of calls
            same = render([*messages[:i], other, *messages[i + 1 :]]) == whole
        except BadConversation:
            same = False
        if same:
            what = "the tool_calls" if message["role"] == "assistant" else f"the role {message['role']!r}"
            raise BadConversation(f"the chat template does not show {what} of message {i}; take one that does")


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """The message with ``mark`` in what a template has to show of it."""
    if message["role"] != "assistant":
        content = message["content"] or ""
        return {**message, "content": content + mark} if content.strip() else message
    if not message.get("tool_calls"):
        return message
    named = [(call, call["function"]) for call in message["tool_calls"]]
    calls = [{**call, "function": {**call_of, "name": f"{call_of.get('name')}{mark}"}} for call, call_of in named]
    return {**message, "tool_calls": calls}


def _compiled(source: str) -> Any:
    from megatron_ds.data.template_sandbox import compile_template  # imports jinja2: only where it is needed

    # Deep nesting is a RecursionError, much else a SyntaxError.
    with RaisedAs(DataError, "the chat template is not valid Jinja", Exception):
        return compile_template(source)


def encode(
    tokenizer: Tokenizer, rendering: Rendering, bos: int | None = None, eod: int | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """(ids of a text, 1 for each that is learnt), with ``bos`` and ``eod`` around them where the text has none.

    Raises:
        BadConversation: the ids of a prompt are not how the ids of the text begin, so that the model would be trained
            on other tokens than it sees in generation; or nothing is learnt.
    """
    text = rendering.text
    ids, starts = tokenizer.encode_marked(text)
    mask = np.zeros(ids.size, np.uint8)
    for start, stop in rendering.answers:
        prompt, _ = tokenizer.encode_marked(text[:start])
        if not np.array_equal(ids[: prompt.size], prompt):
            raise BadConversation(
                f"the tokens of the prompt {text[max(0, start - 20) : start]!r} are others when the answer "
                f"{text[start : start + 20]!r} follows: end the template's generation prompt with a token of its own"
            )
        mask[prompt.size :][starts[prompt.size :] < stop] = 1
    if rendering.blocks is not None:
        ends = np.append(starts[1:], len(text))
        inside = [(starts < stop) & ((starts >= start) | (ends > start)) for start, stop in rendering.blocks]
        mask[~np.any(inside, axis=0)] = 0
    if ids.size and not mask.any():
        raise BadConversation("the chat template writes nothing of the answers")
    if bos is not None and ids.size and ids[0] != bos:
        ids, mask, starts = np.append(bos, ids), np.append(np.uint8(0), mask), np.append(0, starts)
    if eod is not None and ids.size and not _ends(text, ids, starts, eod):
        ids, mask = np.append(ids, eod), np.append(mask, mask[-1])
    return ids, mask


def _ends(text: str, ids: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], eod: int) -> bool:
    """Whether nothing but white space follows the last ``eod``, as in chatml's ``<|im_end|>`` and line end."""
    places = np.flatnonzero(ids == eod)
    if not places.size:
        return False
    after = int(places[-1]) + 1
    return after == ids.size or not text[int(starts[after]) :].strip()


def split_markers(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """Markers such as ``<|im_start|>`` in a template that are no tokens of a tokenizer, and so are cut into pieces."""
    markers = dict.fromkeys(re.findall(r"<\|[^|<>{}\s]+\|>", template.source + template.tool_use))
    return [marker for marker in markers if tokenizer.encode_marked(marker)[0].size != 1]


def load_template(spec: str | None, tokenizer: str, special: dict[str, str] | None = None) -> ChatTemplate:
    """The template that ``spec`` names: ``chatml``, a file, or None for the one in the tokenizer's folder.

    ``special``: the texts of the tokenizer's special tokens, for the template to use.

    Raises:
        DataError: there is none; the message says what to give.
    """
    if spec == "chatml":
        return ChatTemplate(CHATML, special)
    if spec is not None:
        path = Path(spec)
        if not path.is_file():
            raise DataError(f"chat template {spec!r} is not a file; give a Jinja file, or 'chatml'")
        return ChatTemplate(_read_text(path), special)
    if (found := template_of(tokenizer, special)) is None:
        raise DataError(
            f"the tokenizer {tokenizer} has no chat template; give a Jinja file, or 'chatml' (--chat-template)"
        )
    return found


def template_of(tokenizer: str, special: dict[str, str] | None = None) -> ChatTemplate | None:
    """The template in a tokenizer's folder; None: it has none.

    Raises:
        DataError: it cannot be read, or is not valid Jinja.
    """
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    source, tool_use = _of_folder(folder)
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, special, tool_use if isinstance(tool_use, str) else None)


def template_of_dataset(prefix: str, special: dict[str, str] | None = None) -> ChatTemplate | None:
    """The template that conversations were written by, other than their tokenizer's own; None: that one, or not known.

    Args:
        special: as for :func:`load_template`; with other ones the template is not the same.
    """
    manifest = read_manifest(prefix) or {}
    spec = manifest.get("settings", {}).get("chat_template")
    if spec is not None:
        with contextlib.suppress(DataError):  # its file has gone
            template = load_template(spec, "", special)
            if template.fingerprint == manifest.get("chat_template_xxh3"):
                return template
    return None


def _of_folder(folder: Path) -> tuple[Any, Any]:
    """What a tokenizer's folder has as its template, and as the one for tools; None where it has none."""
    if (folder / "chat_template.jinja").is_file():
        tool_use = folder / "additional_chat_templates" / "tool_use.jinja"
        return _read_text(folder / "chat_template.jinja"), _read_text(tool_use) if tool_use.is_file() else None
    source = read_settings(folder / "tokenizer_config.json").get("chat_template")
    if not isinstance(source, list):
        return source, None
    named = {str(entry.get("name")): entry.get("template") for entry in source if isinstance(entry, dict)}
    return named.get("default"), named.get("tool_use")


def _read_text(path: Path) -> str:
    with RaisedAs(DataError, f"the chat template {path} cannot be read", OSError, UnicodeDecodeError):
        return read_text(path)
