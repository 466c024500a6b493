"""The code of models whose blocks have widths of their own, as it also lies in their folders.

A file per family, `modeling_<model type>.py`, and the generic files that it imports relatively: the
layout of any model on the hub that brings code. What runs here is, byte for byte, what an exported
folder carries, so that a proof of an export holds for both, and `save_pretrained` of transformers
copies the right files by itself.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_import_files

_PREFIX = "secateur_"


def is_narrow(model_type: str) -> bool:
    """Whether the models of this type have blocks with widths of their own."""
    return model_type.startswith(_PREFIX)


def narrow_type(model_type: str) -> str:
    """The `model_type` of a narrow model of a family, given that of any model of it."""
    return _PREFIX + stock_type(model_type)


def stock_type(model_type: str) -> str:
    """The `model_type` of a stock model of a family, given that of any model of it."""
    return model_type.removeprefix(_PREFIX)


def config_class(model_type: str) -> Any:
    """The configuration of a narrow type; from then on, transformers loads its models by this code.

    Code that lies in their folders does not run then, not even with `trust_remote_code`.

    Raises:
        ModuleNotFoundError: There is no such type, or transformers has no models of its family.
    """
    module = importlib.import_module(f"{__name__}.modeling_{model_type}")
    found = next(
        value for value in vars(module).values() if getattr(value, "model_type", "") == model_type
    )
    AutoConfig.register(model_type, found, exist_ok=True)
    AutoModel.register(found, found.auto_classes["AutoModel"], exist_ok=True)
    causal_lm = found.auto_classes["AutoModelForCausalLM"]
    AutoModelForCausalLM.register(found, causal_lm, exist_ok=True)
    return found


def code_files(model_type: str) -> list[Path]:
    """The files of code that the folder of a model of a narrow type carries."""
    entry = Path(__file__).with_name(f"modeling_{model_type}.py")
    return [entry, *map(Path, get_relative_import_files(entry))]
