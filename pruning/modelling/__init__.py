"""Code of models whose blocks differ in width, also copied to their folders.

There is a file per family, `modeling_<model type>.py`, and generic files that it imports
relatively, as in any model on the hub with custom code. An exported folder has the same files, byte
for byte, so that the verification of an export holds for both, and `save_pretrained` of
transformers copies the right files.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_import_files

_PREFIX = "secateur_"


def is_narrow(model_type: str) -> bool:
    """Test whether models of this type have blocks that differ in width."""
    return model_type.startswith(_PREFIX)


def narrow_type(model_type: str) -> str:
    """The `model_type` of a narrow model of a family, given that of any model of it."""
    return _PREFIX + stock_type(model_type)


def stock_type(model_type: str) -> str:
    """The `model_type` of a stock model of a family, given that of any model of it."""
    return model_type.removeprefix(_PREFIX)


def config_class(model_type: str) -> Any:
    """Configuration class of a narrow type, registered so that transformers uses this code.

    Code in model folders is then not executed, not even with `trust_remote_code`.

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
    """The code files in the folder of a model of a narrow type."""
    entry = Path(__file__).with_name(f"modeling_{model_type}.py")
    return [entry, *map(Path, get_relative_import_files(entry))]
