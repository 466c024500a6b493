"""A base model: found, read and checked once, without running code from its folder."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur.pruning.chains import Kind, Step, kinds_of, refuse
from secateur.pruning.families import Family, family_named, family_of, skeleton
from secateur.pruning.files.fingerprint import fingerprint, refuse_changed
from secateur.pruning.files.model_folder import (
    CONFIG,
    is_ours,
    read_json,
    read_stages,
    weight_files,
)
from secateur.pruning.modelling import config_class, is_narrow

_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model"]


class BaseModel:
    """A stock model of transformers, or a narrow one that Secateur has exported.

    Every property is computed on first use and cached. The class of a narrow model comes from
    `secateur.pruning.modelling`, not from the copy of that code in its folder.

    Args:
        name: A folder or, as a string, the id of a model on the hub, which is downloaded once.
        setting: Name of the setting that gave `name`, for errors.
    """

    def __init__(self, name: str | Path, setting: str = "base") -> None:
        self.name, self.setting = name, setting

    def check(self) -> None:
        """Check the name without network access; a possible hub id is resolved by `folder`.

        Raises:
            ValueError: A path does not exist, or is not a model folder.
        """
        folder, shown = Path(self.name).expanduser(), f"`{self.setting}` {str(self.name)!r}"
        if not folder.exists():
            if folder.is_absolute() or isinstance(self.name, Path):
                raise ValueError(
                    f"{shown} does not exist; check the path. For a model of the hub give the "
                    "folder that `hf download` puts it in."
                )
            return
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{shown} is not a model folder: it has no {CONFIG}.")
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"{shown} holds no *.safetensors file; save the model with `save_pretrained` (safe "
                "serialisation is its default) first."
            )

    @cached_property
    def folder(self) -> Path:
        """The local folder.

        Raises:
            ValueError: The path is not a model folder, or the hub has no such model.
        """
        self.check()
        folder = Path(self.name).expanduser()
        if folder.exists():
            return folder
        try:
            return Path(snapshot_download(str(self.name), allow_patterns=_FILES))
        except (HFValidationError, HfHubHTTPError, OSError) as error:
            raise ValueError(
                f"`{self.setting}` {str(self.name)!r} is neither a folder nor a model on the hub: "
                f"{error}"
            ) from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Contents of config.json, unchanged.

        Raises:
            ValueError: It cannot be read.
        """
        try:
            return read_json(self.folder / CONFIG)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} has no readable {CONFIG}: {error}") from error

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration.

        Raises:
            ValueError: Neither transformers nor Secateur can read it.
        """
        return read_config(self.folder)

    @cached_property
    def family(self) -> Family:
        """The row of its family.

        Raises:
            ValueError: The family is unknown, or this member of it cannot be pruned.
        """
        return family_of(self.config)

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights.

        Raises:
            ValueError: There are no weight files, or some are missing.
        """
        return weight_files(self.folder)

    @cached_property
    def tensors(self) -> dict[str, Path]:
        """The file of every tensor, by its name."""
        found: dict[str, Path] = {}
        for path in self.weight_files:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(sorted(file.keys()), path)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of configuration and weights.

        Raises:
            ValueError: The model was exported by Secateur and has changed since.
        """
        found = fingerprint(self.folder)
        refuse_changed(self.folder, found)
        return found

    def refuse(self, step: Step) -> None:
        """Refuse a step that this model does not allow.

        Raises:
            ValueError: See `secateur.pruning.chains`.
        """
        kinds = kinds_of(self.config)
        for stage in read_stages(self.folder)[-1:]:
            settings = stage["provenance"].get("weights", {}).get("settings", {})
            if str(settings.get("pattern")).startswith("NM("):
                kinds.add(Kind.PATTERNED)
        refuse(kinds, step)

    def dtype_of(self, dtype: str = "auto") -> torch.dtype:
        """The torch type that a name stands for; "auto" is the type of the files.

        Raises:
            ValueError: There is no such type.
        """
        if dtype == "auto":
            if said := self.settings.get("dtype") or self.settings.get("torch_dtype"):
                return self.dtype_of(str(said))
            name, path = next(iter(self.tensors.items()))
            with safe_open(path, framework="pt") as file:
                first: torch.Tensor = file.get_tensor(name)
                return first.dtype
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"`dtype` must be auto or a torch type, got {dtype!r}.")
        return found

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: shapes without memory."""
        return skeleton(self.config)

    def load(
        self,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """The causal language model with its weights.

        Args:
            dtype: Type of the weights; "auto" keeps that of the files.
            device: Device of the model; None leaves it on the host.
            options: Passed to `from_pretrained`.

        Raises:
            ValueError: The folder cannot be read as a causal language model, or lacks weights.
        """
        if is_ours(self.folder):
            _ = self.fingerprint  # which refuses what has changed
        config = copy.deepcopy(self.config)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.folder, config=config, dtype=dtype, output_loading_info=True, **options
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{self.folder} cannot be read as a causal language model: {error}"
            ) from error
        model, found = loaded
        assert isinstance(model, PreTrainedModel)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"{self.folder} lacks {len(missing)} tensors of a {config.model_type!r} causal "
                f"language model, {missing[0]!r} first; fetch or save it again."
            )
        if device is not None:
            model.to(device)  # type: ignore[arg-type]
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the folder.

        Raises:
            ValueError: There is none.
        """
        return load_tokenizer(self.folder)


def read_config(name: str | Path) -> PreTrainedConfig:
    """The configuration of a model, without its weights.

    Args:
        name: A model folder, a config.json or a hub id.

    Raises:
        ValueError: Neither transformers nor Secateur can read it.
    """
    try:
        model_type = str(PreTrainedConfig.get_config_dict(name)[0].get("model_type"))
        if is_narrow(model_type):
            family_named(model_type)  # reports an unknown family
            config_class(model_type)  # registers it with transformers
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} has no readable {CONFIG}: {error}") from error
    return config


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer.

    Args:
        name: Folder of a model or tokenizer, or a hub id.

    Raises:
        ValueError: There is none.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain exceptions
        raise ValueError(f"{name} has no readable tokenizer: {error}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
