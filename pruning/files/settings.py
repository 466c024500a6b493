"""Refuse to resume under other settings than those in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Every setting that differs, with both values."""
    return [
        f"`{key}` was {saved.get(key)!r} and is now {current.get(key)!r}"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]


def refuse_other(saved: Mapping[str, Any], current: Mapping[str, Any], owner: str) -> None:
    """Compare the settings in a checkpoint with those of this run.

    Args:
        saved: Settings in the checkpoint.
        current: Settings of this run.
        owner: Owner of the settings, for the message.

    Raises:
        ValueError: They differ; names every setting with both values.
    """
    if found := differences(saved, current):
        raise ValueError(
            f"The checkpoint was written under another configuration of {owner}: "
            f"{'; '.join(found)}. Resume with the settings of the run, or start a new one "
            "without `--ckpt_path`."
        )
