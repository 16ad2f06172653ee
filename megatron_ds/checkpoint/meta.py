"""What a checkpoint's ``meta`` says of the model that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic

from megatron_ds.config import ModelConfig
from megatron_ds.errors import CheckpointError


def model_config(meta: dict[str, Any], directory: Path) -> ModelConfig:
    """The model's configuration.

    Raises:
        CheckpointError: the meta has none, or one that this version does not know; ``directory`` is named.
    """
    try:
        return ModelConfig(**meta["config"]["model"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{directory} does not say what model it holds: its meta has no config.model") from None
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{directory} was saved with another version's config.model: {error}") from error
