"""Reading a config.json so that no setting of it is passed over: what is not read must be listed as harmless."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from megatron_ds.errors import ConfigError, listed

# Numbers of tokens, which mean something by one tokenizer alone.
TOKEN_IDS = frozenset((
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "mask_token_id", "cls_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "begin_suppress_tokens",
    "suppress_tokens", "forced_decoder_ids", "sequence_bias",
))  # fmt: skip
# How text is generated. Ours is a trainer: these go with the model, untouched.
GENERATION = TOKEN_IDS | frozenset((
    "prefix", "max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "num_return_sequences", "exponential_decay_length_penalty", "remove_invalid_values", "task_specific_params",
    "output_scores", "return_dict_in_generate",
))  # fmt: skip
# What it is called, who wrote it, which outputs, caches, kernels and labels its user wants.
BOOKKEEPING = frozenset((
    "id2label", "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task", "tokenizer_class",
    "use_cache", "output_past", "output_attentions", "output_hidden_states", "return_dict", "use_return_dict",
    "torchscript", "use_bfloat16", "tf_legacy_loss", "gradient_checkpointing", "chunk_size_feed_forward",
    "pretraining_tp", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "is_decoder",
    "auto_map", "transformers.js_config", "unsloth_version", "unsloth_fixed", "custom_pipeline", "custom_pipelines",
))  # fmt: skip
# Written anew by every save.
REWRITTEN = frozenset(("architectures", "model_type", "_name_or_path", "transformers_version", "torch_dtype", "dtype"))

KEPT = GENERATION | BOOKKEEPING
_HARMLESS = KEPT | REWRITTEN


class Settings(dict[str, Any]):
    """A mapping that notes which of its keys are read."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        super().__init__(values)
        self._read: set[str] = set()
        self._inner: list[Settings] = []
        self.where = where

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        if super().get(key) is None:
            raise ConfigError(f"{self.where} lacks {key}")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value; the default also where the file says null, which means that nothing was chosen."""
        self._read.add(key)
        value = super().get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Whether the file says something of it; does not count as reading."""
        return super().get(key) is not None

    def inner(self, key: str) -> Settings | None:
        """The object at ``key``, whose keys are noted too; None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {key}={value!r} is not an object")
        found = Settings(value, f"{key} in {self.where}")
        self._inner.append(found)
        return found

    def unread(self, harmless: Collection[str] = ()) -> list[str]:
        """The keys that nothing has read; those without a value say nothing."""
        return [
            key
            for key, value in self.items()
            if key not in self._read and key not in _HARMLESS and key not in harmless and value not in (None, {}, [])
        ]

    def said(self, keys: Iterable[str]) -> list[str]:
        """Each with its value, of which long lists and inner objects are cut."""
        values = {key: repr(self[key]) for key in keys}
        return [f"{key}={value if len(value) <= 60 else value[:57] + '...'}" for key, value in values.items()]

    def check_all_read(self, harmless: Collection[str] = ()) -> None:
        """A :class:`ConfigError` that lists what is not read."""
        left = self.said(self.unread(harmless))
        if left:
            raise ConfigError(
                f"{self.where} has settings that are not known here, so the model may compute something else: "
                f"{listed(left)}. If they change nothing, remove them from the file"
            )
        for inner in self._inner:
            inner.check_all_read()


def must_be(config: Settings, **fields: Any) -> None:
    """Refuse a config.json in which a field has a meaning that our model does not have. Absent fields pass."""
    for name, wanted in fields.items():
        if config.get(name, wanted) != wanted:
            raise ConfigError(f"{name}={config[name]!r} in {config.where} is not supported, only {wanted!r}")
