"""A model's tokenizer and chat template: prompts as tokens, tokens as parts of a text."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ds.data.chat import ChatTemplate, template_of
from megatron_ds.data.chat_records import BadConversation, request_messages
from megatron_ds.data.tokenizer_base import KNOWN_NAME
from megatron_ds.data.tokenizers import HFTokenizer, Tokenizer, load_tokenizer
from megatron_ds.errors import ConfigError, DataError, RaisedAs
from megatron_ds.inference.detokenizer import TextEnds

log = logging.getLogger(__name__)
Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, tokens, or one of the two under the names that vLLM has for them: ``prompt``, ``prompt_token_ids``."""


def unnamed(prompt: Prompt) -> str | Sequence[int]:
    """The text or the tokens of a prompt; tokens where both are named.

    Raises:
        ConfigError: it names neither, or something else beside them.
    """
    if not isinstance(prompt, Mapping):
        return prompt
    tokens, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
    if prompt.keys() - {"prompt", "prompt_token_ids"} or (tokens is None and text is None):
        raise ConfigError(
            f"a prompt is a text, tokens, {{'prompt': text}} or {{'prompt_token_ids': tokens}}; this one has the keys "
            f"{', '.join(map(str, prompt)) or 'of an empty dictionary'}"
        )
    found: Any = text if tokens is None else tokens
    return found


class Texts:
    """A model's tokenizer and chat template.

    Args:
        model: whose they are, for messages.
        tokenizer: None: prompts come as tokens, and answers have no text.
        template: None: there are no conversations. fault: what is wrong with the one that the model has.
    """

    def __init__(
        self, model: str | Path, tokenizer: Tokenizer | None, template: ChatTemplate | None = None, fault: str = ""
    ):
        self.model, self.tokenizer, self.template, self._fault = model, tokenizer, template, fault

    @classmethod
    def load(cls, model: str | Path, folder: str | Path | None) -> Texts:
        """The tokenizer in ``folder`` with its template, if it has one.

        With a damaged template texts are served all the same.

        Raises:
            DataError: the tokenizer cannot be read.
        """
        if folder is None:
            return cls(model, None)
        tokenizer = load_tokenizer(folder)
        try:
            return cls(model, tokenizer, template_of(str(folder), tokenizer.special))
        except DataError as error:
            log.warning("%s: there are no conversations: %s", model, error)
            return cls(model, tokenizer, fault=str(error))

    def tokenize(self, prompt: str | Sequence[int], add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, where names of special tokens stand for these, with those that begin one; tokens stay
        as they are.

        Raises:
            ConfigError: there is no tokenizer, or the text is none.
        """
        if not isinstance(prompt, str):
            with RaisedAs(ConfigError, "a prompt is a text or a list of tokens, which are whole numbers", TypeError):
                return [operator.index(token) for token in prompt]
        tokenizer = self._require_tokenizer()
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ConfigError("the prompt has half of a surrogate pair, which is no character: give valid Unicode")
        if isinstance(tokenizer, HFTokenizer):
            return list(tokenizer.backend.encode(prompt, add_special_tokens=add_special_tokens).ids)
        tokens = [int(token) for token in tokenizer.encode_marked(prompt)[0]]
        begins, ends = tokenizer.begins and add_special_tokens, tokenizer.ends and add_special_tokens
        begin = [tokenizer.bos_id] if begins and tokenizer.bos_id is not None else []
        return [*begin, *tokens, *([tokenizer.eod_id] if ends and tokenizer.eod_id is not None else [])]

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None = None,
        add_special_tokens: bool = False,
        **how: Any,
    ) -> list[int]:
        """The tokens of a conversation by the chat template, up to where the answer begins.

        Args:
            add_special_tokens: besides those that the template writes.
            how: see :meth:`ChatTemplate.prompt`.

        Raises:
            ConfigError: there is no template, or it refuses the conversation.
        """
        if self.template is None:
            why = self._fault or "it has no chat template"
            raise ConfigError(f"{self.model}: {why}; put a chat_template.jinja beside its tokenizer")
        try:
            text = self.template.prompt(request_messages(messages), tools, **how)
        except BadConversation as error:
            raise ConfigError(str(error)) from None
        return self.tokenize(text, add_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text."""
        return f"token_id:{token}".encode() if self.tokenizer is None else self.tokenizer.token_bytes(token)

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens add to a text together, with a mark for what is no character."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones by their names."""
        return self._require_tokenizer().decode(tokens)

    def ends(self, generation: Mapping[str, Any]) -> TextEnds:
        """The tokens that end an answer, by what came with the model and by the tokenizer.

        A model that was trained on conversations often ends as its tokenizer says, ``<|im_end|>``, and still has the
        base model's ``generation_config.json``.
        """
        tokenizer, said = self.tokenizer, generation.get("eos_token_id")
        eos = tuple(said) if isinstance(said, list) else () if said is None else (int(said),)
        if tokenizer is None:
            return TextEnds(eos)
        guessed = tokenizer.eod_origin == KNOWN_NAME
        if tokenizer.eod_id is not None and tokenizer.eod_id not in eos and not (eos and guessed):
            eos = (*eos, tokenizer.eod_id)
        hidden = {tokenizer.token_id(text) for text in tokenizer.special.values()} | set(eos)
        if isinstance(tokenizer, HFTokenizer):
            added = tokenizer.backend.get_added_tokens_decoder()
            hidden |= {number for number, token in added.items() if token.special}
        return TextEnds(eos, frozenset(token for token in hidden if token is not None))

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError(f"{self.model} has no tokenizer; name one (tokenizer=...), or give prompts as token ids")
        return self.tokenizer
