"""Configurations of models that start from random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig


def make_config(architecture: Mapping[str, Any]) -> Any:
    """The configuration of a model to start from scratch.

    Args:
        architecture: `model_type` and any settings of the family's configuration.

    Raises:
        ValueError: It names no `model_type`, or one that transformers does not know.
    """
    settings = dict(architecture)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise ValueError("`architecture` needs a `model_type`, such as llama.")
    try:
        return AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        raise ValueError(f"`architecture` is not one that transformers knows: {error}") from error
