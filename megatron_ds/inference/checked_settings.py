"""Settings that a user gives by name, checked when they are made."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import pydantic
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megatron_ds.errors import ConfigError, nearest

P = ParamSpec("P")
S = TypeVar("S")
Settings = TypeVar("Settings")

OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "num_return_sequences": "n",
    "do_sample": "temperature",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "random_seed": "seed",
    "tp": "tensor_parallel_size",
    "tp_size": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "pp_size": "pipeline_parallel_size",
    "max_length": "max_model_len",
    "context_length": "max_model_len",
    "max_batch_size": "max_num_seqs",
    "torch_dtype": "dtype",
    "compile": "enforce_eager",
}
"""Settings as transformers and other engines call them."""


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))
class CheckedSettings:
    """Base of classes of settings whose fields' types say which values there are.

    Raises:
        ConfigError: a value that is none of them, by its name, or a name that there is not.
    """

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _as_config_error(cls, given: Any, validate: pydantic.ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validate(given)
        except pydantic.ValidationError as error:
            faults = (f"{e['loc'][0]}={e['input']!r:.100}: {e['msg']}{cls._meant(e)}" for e in error.errors())
            raise ConfigError("; ".join(faults)) from None

    @classmethod
    def _meant(cls, error: Mapping[str, Any]) -> str:
        """What an unknown name stands for: what transformers calls it, or the nearest one."""
        if error["type"] != "unexpected_keyword_argument":
            return ""
        name, fields = str(error["loc"][0]), [field.name for field in dataclasses.fields(cls)]
        meant = OTHER_NAMES.get(name)
        return f"; did you mean {meant!r}?" if meant in fields else nearest(name, fields)


def takes_fields_of(
    settings: Callable[P, Settings],
) -> Callable[[Callable[[S, Settings], None]], Callable[Concatenate[S, P], None]]:
    """Let an ``__init__`` that takes ``settings`` take their fields as its arguments; type checkers and ``help()`` show
    these."""

    def decorate(init: Callable[[S, Settings], None]) -> Callable[Concatenate[S, P], None]:
        @functools.wraps(init)
        def taking(self: S, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, settings(*args, **kwargs))

        own = inspect.signature(init).parameters["self"], *inspect.signature(settings).parameters.values()
        taking.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        return taking

    return decorate
