"""What a checkpoint's ``meta`` says of the model that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import pydantic

from megatron_ds.config import BaseModelConfig
from megatron_ds.errors import CheckpointError

M = TypeVar("M", bound=BaseModelConfig)


def model_config(section: type[M], meta: dict[str, Any], directory: Path) -> M:
    """The model's configuration, as a family's ``section``.

    Raises:
        CheckpointError: the meta has none, or one that this version does not know; ``directory`` is named.
    """
    try:
        return section(**meta["config"]["model"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{directory} does not say what model it holds: its meta has no config.model") from None
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{directory} was saved with another version's config.model: {error}") from error
