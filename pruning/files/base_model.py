"""A base model: found, read and checked once, without running code from its folder."""

from __future__ import annotations

import copy
from functools import cached_property
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version

from secateur.pruning.chains import Kind, Step, kinds_of, refuse
from secateur.pruning.families import FAMILIES, Family, family_named, family_of, skeleton
from secateur.pruning.files.fingerprint import fingerprint, refuse_changed
from secateur.pruning.files.folder_checks import (
    check_folder,
    check_settings,
    model_settings,
    read_settings,
)
from secateur.pruning.files.headers import Header, read_headers, read_tensor, weight_files
from secateur.pruning.files.judge import judge, judge_blocks
from secateur.pruning.files.model_folder import COMPANIONS, CONFIG, is_ours, read_stages
from secateur.pruning.modelling import config_class, is_narrow, stock_type

# What is fetched of a model of the hub: what is read here, and what an export copies.
_FILES = [CONFIG, "*.safetensors", "*.safetensors.index.json", *COMPANIONS]
_FILES += ["additional_chat_templates/*"]

_TOKENIZERS = ("tokenizer*", "vocab.*", "*.model")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


class BaseModel:
    """A stock model of transformers, or a narrow one that Secateur has exported.

    Every property is computed on first use and cached. The class of a narrow model comes from
    `secateur.pruning.modelling`, not from the copy of that code in its folder.

    Args:
        name: A folder or, as a string, the id of a model on the hub, which is downloaded once.
        setting: Name of the setting that gave `name`, for errors.
        trust_remote_code: Whether Python files of its tokenizer may run. Models never run by code
            that lies in their folders.
    """

    def __init__(
        self, name: str | Path, setting: str = "base", trust_remote_code: bool = False
    ) -> None:
        self.name, self.setting = name, setting
        self.trust_remote_code = trust_remote_code

    def check(self) -> None:
        """Check the name without network access; a possible hub id is resolved by `folder`.

        Raises:
            ValueError: A path does not exist, or holds no text model.
        """
        folder = Path(expanduser(self.name))
        if folder.exists():
            check_folder(folder, self._shown)
            check_settings(read_settings(folder), self._shown)
        elif folder.is_absolute() or isinstance(self.name, Path):
            raise ValueError(
                f"{self._shown} does not exist; check the path. For a model of the hub give the "
                "folder that `hf download` puts it in."
            )

    @property
    def _shown(self) -> str:
        return f"`{self.setting}` {str(self.name)!r}"

    @cached_property
    def folder(self) -> Path:
        """The local folder.

        Raises:
            ValueError: The path is not a model folder, or the hub has no such model.
        """
        self.check()
        folder = Path(expanduser(self.name))
        if folder.exists():
            return folder
        try:
            folder = Path(snapshot_download(str(self.name), allow_patterns=_FILES))
        except (HFValidationError, HfHubHTTPError, OSError) as error:
            raise ValueError(
                f"{self._shown} is neither a folder nor a model on the hub: {error}"
            ) from error
        check_folder(folder, self._shown)
        check_settings(read_settings(folder), self._shown)
        return folder

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What config.json says of the model, as it is written.

        Raises:
            ValueError: It cannot be read.
        """
        return read_settings(self.folder)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration.

        Raises:
            ValueError: Neither transformers nor Secateur can read it.
        """
        return config_of(self.settings, self.folder)

    @cached_property
    def _judged(self) -> bool:
        """Whether the files are known to hold the model; see `judge`."""
        if Kind.PACKED in kinds_of(self.config) or stock_type(self.config.model_type) not in (
            FAMILIES
        ):
            return False
        family = family_named(self.config.model_type)
        judge_blocks(self.folder, family, self.headers, self.config.num_hidden_layers)
        judge(self.folder, family, self.headers, self.skeleton())
        return True

    def judge(self) -> None:
        """Compare the headers of the files with the model that the configuration makes.

        Names, shapes and types of all tensors, ties and indices, once. Models that are stored
        quantised have other tensors, and those of unknown families may: reading these tells.

        Raises:
            ValueError: They differ, or a file cannot be read.
        """
        _ = self._judged

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
    def headers(self) -> dict[str, Header]:
        """What the files say of every tensor, by its name.

        Raises:
            ValueError: A file cannot be read.
        """
        return read_headers(self.folder)

    @cached_property
    def tensors(self) -> dict[str, Path]:
        """The file of every tensor, by its name.

        Raises:
            ValueError: They are not those of the model.
        """
        self.judge()
        if Kind.PACKED in kinds_of(self.config):
            raise ValueError(
                f"{self._shown} is stored quantised (`quantization_config`); its tensors can be "
                "neither cut nor divided. Give the original weights."
            )
        return {name: header.path for name, header in self.headers.items()}

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

    def dtype_of(self, dtype: str = "auto", setting: str = "dtype") -> torch.dtype:
        """The torch type that a name stands for; "auto" is the type of the files.

        Args:
            dtype: The name.
            setting: The setting that has it, for the message.

        Raises:
            ValueError: There is no such type.
        """
        if dtype == "auto":
            if said := self.settings.get("dtype") or self.settings.get("torch_dtype"):
                return self.dtype_of(str(said))
            name, header = next(iter(self.headers.items()))
            return read_tensor(header.path, name).dtype
        if (found := _DTYPES.get(dtype)) is None:
            known = " or ".join(["auto", *_DTYPES])
            raise ValueError(f"`{setting}` must be {known}, got {dtype!r}.")
        return found

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: shapes without memory. It is made once; leave it as it is.

        Raises:
            ValueError: The configuration makes none.
        """
        return self._skeleton

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        try:
            return skeleton(self.config)
        except Exception as error:  # of any kind: the numbers in it are somebody else's
            raise ValueError(
                f"{self.folder / CONFIG} makes no causal language model: {error}"
            ) from error

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
        self.judge()
        config = copy.deepcopy(self.config)
        if isinstance(dtype, str) and dtype != "auto":
            dtype = self.dtype_of(dtype)
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
        for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "does not know")):
            if not self._judged and (names := sorted(found[key])):
                raise ValueError(
                    f"{self.folder}: a {config.model_type!r} causal language model {what} "
                    f"{len(names)} tensors, {names[0]!r} first; fetch or save it again."
                )
        if device is not None:
            model.to(device)  # type: ignore[arg-type]
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the folder.

        Raises:
            ValueError: There is none.
        """
        return load_tokenizer(self.folder, self.trust_remote_code)


def read_config(name: str | Path) -> PreTrainedConfig:
    """The configuration of a model, without its weights.

    Args:
        name: A model folder, a config.json or a hub id.

    Raises:
        ValueError: Neither transformers nor Secateur can read it.
    """
    path = Path(expanduser(name))
    if path.is_absolute() and not path.exists():
        raise ValueError(f"{path} does not exist; check the path.")
    if path.is_dir() and not (path / CONFIG).is_file():
        raise ValueError(f"{path} is not a model folder: it has no {CONFIG}.")
    try:
        settings = PreTrainedConfig.get_config_dict(path if path.exists() else name)[0]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} has no readable {CONFIG}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name} has no readable {CONFIG}: it is not a JSON object.")
    return config_of(model_settings(settings), name)


def config_of(settings: dict[str, Any], name: str | Path) -> PreTrainedConfig:
    """The configuration of a class of transformers or of ours, whatever the folder may bring."""
    model_type = str(settings.get("model_type"))
    if is_narrow(model_type):
        family_named(model_type)  # an unknown one is told
        config_class(model_type)  # from here on, transformers knows it
    elif model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name} has no readable {CONFIG}: transformers {transformers_version} knows no "
            f"`model_type` {model_type!r}. Known here are {', '.join(sorted(FAMILIES))}; code in a "
            "model folder is not run."
        )
    fields = {key: value for key, value in settings.items() if key != "model_type"}
    try:
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **copy.deepcopy(fields))
    except Exception as error:  # of any kind: what it holds is somebody else's
        raise ValueError(f"{name} has no readable {CONFIG}: {error}") from error
    config.name_or_path = str(name)
    return config


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer.

    Args:
        name: Folder of a model or tokenizer, or a hub id.
        trust_remote_code: Whether Python files that it brings may run.

    Raises:
        ValueError: There is none, or it is code that is not to run.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain exceptions
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"The tokenizer of {name} is code of its own, which runs only if "
                "`trust_remote_code` is true: read it first."
            ) from error
        if Path(name).is_dir() and not any(map(any, map(Path(name).glob, _TOKENIZERS))):
            raise ValueError(
                f"{name} holds no tokenizer, no {' or '.join(_TOKENIZERS)}; "
                "save that of the model it was made from into it."
            ) from error
        raise ValueError(f"{name} has no readable tokenizer: {error}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
