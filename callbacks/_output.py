"""Check where callbacks may write."""

from __future__ import annotations

from pathlib import Path

_TAKEN = ("plan", "plots", "checkpoints", "metrics", "logs", "depth", "weights", "widths", "model")


def check_folder(callback: str, folder: str, *own: str) -> None:
    """Check that a folder is inside the output folder of the run and is not used otherwise.

    Args:
        callback: Name of the callback.
        folder: Its setting `folder`.
        own: Folder names of a run that are reserved for such callbacks.

    Raises:
        ValueError: It is elsewhere, or a run keeps something else there.
    """
    path = Path(folder)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(
            f"`folder` of {callback} must be below `trainer.default_root_dir`, got {folder!r}; "
            f"choose a name, such as {own[0]}."
        )
    if path.parts[0] in {*_TAKEN} - {*own}:
        raise ValueError(
            f"`folder` of {callback} is {folder!r}, where a run keeps something else; choose "
            f"another name, such as {own[0]}."
        )
