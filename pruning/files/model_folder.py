"""Model folders on disk: their contents, and writing them completely or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.pruning.families import FAMILIES, Family
from secateur.pruning.modelling import is_narrow
from secateur.pruning.plan import DESCRIPTION, TENSORS, Plan

CONFIG = "config.json"
MARK = "secateur.json"
"""File in our model folders that records how the model was made and which files were written."""
BLOCKS = "blocks.json"
"""File that records removed blocks and their base model."""
MASKS = "masks"
"""Subfolder with the masks of single weights, which nothing there loads as weights."""
SHARD_BYTES = 5_000_000_000
"""Largest weight file in bytes, unless one tensor is larger."""

# Files of a model folder beside weights and configuration, licence included.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


def is_ours(folder: Path) -> bool:
    """Test whether Secateur wrote a model folder, so that it may be replaced."""
    return (folder / CONFIG).is_file() and ((folder / MARK).is_file() or _written_before(folder))


def is_plan(folder: Path) -> bool:
    """Test whether a folder holds only a plan, so that it may be replaced."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != {DESCRIPTION, TENSORS}:
        return False
    try:
        Plan.load(folder)
    except ValueError:
        return False
    return True


def _written_before(folder: Path) -> bool:
    """Test whether a folder is a model of ours from before `secateur.json` existed."""
    if (folder / BLOCKS).is_file() or (folder / MASKS / "masks.safetensors").is_file():
        return True
    try:
        plan, config = Plan.load(folder), read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    # A run folder, with logs and checkpoints, or a base model may also hold a plan: these are not
    # ours.
    if (widths := plan.stock_widths()) is None:
        return is_narrow(str(config.get("model_type")))
    family = FAMILIES.get(plan.model_type)
    return family is not None and config.get(family.mlp_width) == widths["mlp_mid"]


def refuse_foreign(folder: str | Path, may_go: Callable[[Path], bool] = is_ours) -> None:
    """Refuse to overwrite files that Secateur did not write.

    Args:
        folder: Folder to write.
        may_go: Tells whether an existing folder may be replaced.

    Raises:
        ValueError: `folder` exists, is not empty and is not ours, or holds a file that is not.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not may_go(folder):
        raise ValueError(
            f"`folder` {folder} exists and is not what Secateur writes there; it is left "
            "unchanged. Choose another folder or remove it yourself."
        )
    if foreign := _not_written_by_us(folder):
        raise ValueError(
            f"`folder` {folder} holds {', '.join(foreign)}, which Secateur did not write and would "
            "remove; move it elsewhere, or choose another folder."
        )


def _not_written_by_us(folder: Path) -> list[str]:
    """Names in a folder that its `secateur.json` does not list; one without a list allows all."""
    try:
        written = read_json(folder / MARK)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return sorted(path.name for path in folder.iterdir() if path.name not in written)


def refuse_base(folder: str | Path, base_folder: str | Path) -> None:
    """Refuse to overwrite the base model.

    Raises:
        ValueError: Both are the same folder.
    """
    if Path(folder).resolve() == Path(base_folder).resolve():
        raise ValueError(
            f"`folder` {folder} is the base model itself; choose another folder "
            "(`--trainer.default_root_dir` in a run)."
        )


@contextmanager
def replaced_folder(folder: str | Path, may_go: Callable[[Path], bool] = is_ours) -> Iterator[Path]:
    """A temporary folder to write into, which replaces `folder` when the block ends without error.

    On an error it is removed and `folder` is unchanged. Leftovers of a killed run are removed
    first.

    Args:
        folder: Folder to write.
        may_go: Tells whether an existing folder may be replaced.

    Raises:
        ValueError: `folder` exists, is not empty and is not ours.
    """
    folder = Path(folder).absolute()
    refuse_foreign(folder, may_go)
    partial = folder.with_name(f".{folder.name}.secateur-partial")
    replaced = folder.with_name(f".{folder.name}.secateur-replaced")
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)  # a run was killed between the two renames below
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        _let_others_read(partial)
        refuse_foreign(folder, may_go)
        # POSIX cannot swap two folders: the old one is renamed, and restored on failure.
        _remove(replaced)
        if folder.exists():
            folder.rename(replaced)
        try:
            partial.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
        _remove(replaced)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _let_others_read(folder: Path) -> None:
    """A server under another user reads what it serves; some libraries write for one user alone."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def in_block(family: Family, name: str) -> tuple[int, str]:
    """Block of a tensor, and its name relative to it; -1 and the full name outside of blocks."""
    prefix = f"{family.blocks}."
    if not name.startswith(prefix):
        return -1, name
    block, _, relative = name.removeprefix(prefix).partition(".")
    return (int(block), relative) if block.isdecimal() else (-1, name)


def companions(folder: Path) -> list[Path]:
    """What a model folder holds beside weights and configuration; code is no part of it."""
    found = (path for pattern in COMPANIONS for path in sorted(folder.glob(pattern)))
    return [path for path in dict.fromkeys(found) if path.suffix != ".py"]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object.")
    return content


def read_stages(folder: Path) -> list[dict[str, Any]]:
    """Read the stages that led to a model; none if Secateur did not write it.

    Raises:
        ValueError: `secateur.json` is damaged.
    """
    path = folder / MARK
    if not path.is_file():
        return []
    try:
        stages: list[dict[str, Any]] = read_json(path)["stages"]
        for stage in stages:
            _check_stage(stage)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: {error!r}; export the model again, or remove the file, and the "
            "story of the model begins anew."
        ) from error
    return stages


def _check_stage(stage: Mapping[str, Any]) -> None:
    """Check what others read of a stage.

    Raises:
        KeyError: Something is missing.
        TypeError: Something is of another type.
    """
    numbers = [stage["context_tokens"]]
    texts = [stage["base"], *stage["provenance"], *stage["models"]]
    for figures in stage["models"].values():
        numbers += [figures["parameters"], figures["flops_per_token"]]
        numbers += figures["perplexity"].values()
    weights = stage["provenance"].get("weights", {})
    if not isinstance(weights, dict) or not isinstance(weights.get("settings", {}), dict):
        raise TypeError("`weights` is no object")
    if len(stage["models"]) < 2:
        raise TypeError("`models` has not both models")
    if wrong := [n for n in numbers if isinstance(n, bool) or not isinstance(n, int | float)]:
        raise TypeError(f"{wrong[0]!r} is no number")
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{wrong[0]!r} is no text")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object so that equal contents give equal files."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
