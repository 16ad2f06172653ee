"""Settings that a user gives by name, checked when they are made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import pydantic
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megatron_ds.errors import ConfigError

P = ParamSpec("P")
S = TypeVar("S")
Settings = TypeVar("Settings")


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
            faults = (f"{e['loc'][0]}={e['input']!r:.100}: {e['msg']}" for e in error.errors())
            raise ConfigError("; ".join(faults)) from None


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
