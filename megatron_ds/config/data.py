"""What has to fit together in the ``data`` section of a run on text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ds.config.text import DataConfig, RunConfig

_OWN_BLENDS = ("train_blend", "valid_blend", "test_blend")


def data_faults(config: RunConfig, needed: bool = True) -> Iterator[str]:
    """Why the data settings do not say one thing, if they do not. ``synthetic`` asks for none of them."""
    data = config.data
    if data.synthetic:
        return
    own = [f"data.{name}" for name in _OWN_BLENDS if getattr(data, name)]
    given = ["data.prefix"] * bool(data.prefix) + ["data.blend"] * bool(data.blend) + own[:1]
    if not given and needed:
        yield (
            "data.prefix is not set: give the path or URL of a .bin/.idx pair without its suffix "
            "(tools/preprocess_data.py makes one), data.blend for several, or --data.synthetic"
        )
    elif len(given) > 1:
        yield (
            f"{' and '.join(given)} each say where the samples come from; keep one of them (--data.prefix None unsets "
            "the one of a file)"
        )
    elif data.prefix and _is_blend(data.prefix.split()):
        yield f"data.prefix={data.prefix!r} is one dataset; a blend is --data.blend {data.prefix}"
    if own and "data.train_blend" not in own:
        yield f"{own[0]} without data.train_blend: nothing to train on; give data.train_blend too, or data.blend"
    for name in ("blend", *_OWN_BLENDS):
        for weight, prefix in getattr(data, name):
            if not weight > 0:
                yield f"data.{name}: the weight {weight:g} of {prefix!r} must be positive; leave it out for none"
    yield from _fim_faults(data)


def _is_blend(words: list[str]) -> bool:
    """Whether these are weights and prefixes in turn, as Megatron-LM's ``--data-path`` has them."""
    return len(words) > 1 and all(word.replace(".", "", 1).isdigit() for word in words[::2])


def _fim_faults(data: DataConfig) -> Iterator[str]:
    fim = data.fim
    if not fim.rate:
        return
    if fim.tokens is None:
        yield (
            f"data.fim.rate={fim.rate:g} needs data.fim.tokens: the names of the prefix, middle and suffix sentinels, "
            "e.g. '<|fim_prefix|>' '<|fim_middle|>' '<|fim_suffix|>'"
        )
    if data.tokenizer is None:
        yield f"data.fim.rate={fim.rate:g} needs data.tokenizer: it knows the sentinels, and the end of a document"
    if data.conversations:
        yield (
            f"data.fim.rate={fim.rate:g} with data.conversations: a conversation is not rearranged; use "
            "data.fim.rate=0, or train on texts"
        )
