"""Update a pruned model that an earlier version has exported.

Earlier exports have their plan at the top level of the folder, where servers load it as weights. It
is moved to the subfolder `plan`, and the code, formerly one file for all families, is replaced by
the current one. Weights and all other files are unchanged.

As a command: `python -m secateur repair --help`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from secateur.pruning.commands import CommandParser
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.files.model_folder import (
    CONFIG,
    MARK,
    is_ours,
    read_json,
    write_json,
)
from secateur.pruning.modelling import code_files, config_class, is_narrow, narrow_type
from secateur.pruning.modelling.secateur_narrow import auto_map
from secateur.pruning.plan import DESCRIPTION, IN_MODEL, TENSORS, Plan


def repair(folder: str | Path) -> list[str]:
    """Update an exported folder; a current one is unchanged.

    Args:
        folder: A pruned model, cut by a plan.

    Returns:
        The changes, one sentence each.

    Raises:
        ValueError: The folder is not a pruned model.
    """
    folder = Path(folder)
    BaseModel(folder, "folder").judge()
    if not is_ours(folder):
        raise ValueError(
            f"`folder` {folder} is not a model cut by a plan: it lacks {CONFIG}, a plan, or "
            f"{MARK}. Give the `model` folder of a run."
        )
    changed = []
    plan = Plan.load(folder)
    if (folder / TENSORS).is_file():
        plan.save(folder / IN_MODEL)  # complete before the old one is removed
        for name in (DESCRIPTION, TENSORS):
            (folder / name).unlink(missing_ok=True)
        changed.append(f"The plan was moved into {IN_MODEL}/.")
    if is_narrow(str(read_json(folder / CONFIG)["model_type"])):
        for ours in code_files(narrow_type(plan.model_type)):
            theirs = folder / ours.name
            if not theirs.is_file() or theirs.read_bytes() != ours.read_bytes():
                partial = theirs.with_suffix(".partial")
                shutil.copyfile(ours, partial)
                os.replace(partial, theirs)
                changed.append(f"{theirs.name} was replaced by that of this version.")
        config, found = read_json(folder / CONFIG), config_class(narrow_type(plan.model_type))
        classes = auto_map(found.auto_classes)
        if config.get("auto_map") != classes:
            write_json(folder / CONFIG, config | {"auto_map": classes})
            changed.append(f"{CONFIG} was changed to the classes of this version.")
        if (all_families := folder / "modeling_secateur.py").is_file():  # no longer used
            all_families.unlink()
            changed.append(f"{all_families.name}, the code of all families, was removed.")
    if changed and (folder / MARK).is_file() and "files" in (mark := read_json(folder / MARK)):
        names = sorted(path.name for path in folder.iterdir())
        write_json(folder / MARK, mark | {"files": names, "fingerprint": fingerprint(folder)})
    return changed


_HELP = """\
Update a pruned model that an earlier version has exported.

The plan is moved from the top level of FOLDER, where servers such as vLLM load it as weights, to
plan/, and the code, if there is any, is replaced by that of this version. Weights are not changed.
A folder that is up to date is left unchanged.

example:
  python -m secateur repair runs/disp/model
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `python -m secateur repair FOLDER`."""
    parser = CommandParser("repair", _HELP)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a pruned model")
    args = parser.parse_args(arguments)
    with parser.naming():
        changed = repair(args.folder)
    said = "\n".join(changed) or f"{args.folder} is up to date."
    Console(soft_wrap=True).print(said, markup=False, highlight=False)
