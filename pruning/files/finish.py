"""What every model folder that is written gets beside weights and configuration: one list of rules.

- The companions of the base model: tokenizer, chat templates, licence, notices.
- No code but ours, and nothing that names other code.
- A configuration that readers of transformers 4 and 5 understand alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.pruning.files.folder_checks import leads_out
from secateur.pruning.files.model_folder import CONFIG, companions, read_json, write_json
from secateur.pruning.modelling import code_files, config_class, is_narrow
from secateur.pruning.modelling.secateur_narrow import auto_map

_TOKENIZER = "tokenizer_config.json"


def finish(folder: Path, base_folder: Path | None = None) -> None:
    """Complete a model folder that has its weights and its configuration.

    Args:
        folder: The folder.
        base_folder: The model that it was made of; None where there is none.
    """
    if base_folder is not None:
        copy_companions(base_folder, folder)
    _name_no_code(folder)  # a tokenizer that was saved, of no base
    _only_our_code(folder)
    settings = read_json(folder / CONFIG)
    write_json(folder / CONFIG, settings | for_older_readers(settings))


def copy_companions(base_folder: Path, folder: Path) -> None:
    """Copy what a model folder holds beside weights and configuration; nothing there names code."""
    for path in companions(base_folder):
        if leads_out(path, base_folder):  # somebody has put it there since it was checked
            continue
        if path.is_dir():
            ignored = shutil.ignore_patterns("*.py")
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copyfile(path, folder / path.name)
    _name_no_code(folder)


def _name_no_code(folder: Path) -> None:
    if (folder / _TOKENIZER).is_file():
        said = read_json(folder / _TOKENIZER)
        if said.pop("auto_map", None) is not None:
            write_json(folder / _TOKENIZER, said)


def _only_our_code(folder: Path) -> None:
    settings = read_json(folder / CONFIG)
    settings.pop("auto_map", None)
    ours = []
    if is_narrow(model_type := str(settings.get("model_type"))):
        ours = code_files(model_type)
        settings["auto_map"] = auto_map(config_class(model_type).auto_classes)
    for path in folder.rglob("*.py"):
        path.unlink()
    for path in ours:
        shutil.copyfile(path, folder / path.name)
    write_json(folder / CONFIG, settings)


def for_older_readers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields under the names that transformers 4 has for them; 5 reads both.

    Without them version 4 takes the defaults of the family and says nothing.
    """
    fields: dict[str, Any] = {}
    if dtype := settings.get("dtype"):
        fields["torch_dtype"] = dtype
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict):
        return fields
    # Gemma 3 has tables for each kind of attention, and version 4 one base and one local base.
    local, whole = rope.get("sliding_attention"), rope.get("full_attention")
    if isinstance(local, dict) and isinstance(whole, dict):
        fields["rope_local_base_freq"] = local["rope_theta"]
        rope = whole
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        moved = ("rope_theta", "partial_rotary_factor")
        fields["rope_scaling"] = {k: v for k, v in rope.items() if k not in moved}
    return fields
