"""Find and read base models, with errors that a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model"]


def check_base(base: str) -> None:
    """Check what can be told at once; what may be a hub id is left to `resolve`.

    Raises:
        ValueError: A path does not exist or is not a model folder.
    """
    folder = Path(base).expanduser()
    if not folder.exists():
        if folder.is_absolute():
            raise ValueError(f"`base` {base!r} does not exist; check the path.")
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"`base` {base!r} is not a model folder: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"`base` {base!r} holds no *.safetensors file; save the model with "
            "`save_pretrained` (safe serialisation is its default) first."
        )


def resolve(base: str) -> Path:
    """The local folder of a model given by a path or a hub id; hub models are fetched once.

    Raises:
        ValueError: The path is not a model folder, or the hub has no such model.
    """
    check_base(base)
    folder = Path(base).expanduser()
    if folder.exists():
        return folder
    try:
        return Path(snapshot_download(base, allow_patterns=_FILES))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"`base` {base!r} is neither a folder nor a model that the hub gives: {error}"
        ) from error


def load_model(folder: Path, dtype: torch.dtype | str = "auto", **options: Any) -> PreTrainedModel:
    """A causal language model from its folder.

    Args:
        folder: Model folder, see `resolve`.
        dtype: Type of the weights; "auto" keeps that of the file.
        options: Passed to `from_pretrained`.

    Raises:
        ValueError: The folder cannot be read as a causal language model.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as a causal language model: {error}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def load_config(folder: Path) -> Any:
    """The configuration in a model folder.

    Raises:
        ValueError: There is none that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} has no readable config.json: {error}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder.

    Raises:
        ValueError: There is none.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} has no readable tokenizer: {error}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
