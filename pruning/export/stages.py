"""History of a model, stage by stage: `secateur.json` in its folder.

The file also marks a folder as written by Secateur, so that a later export may replace it, and
names the files that were written: a folder with other files in it is not replaced.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secateur import __version__
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.files.model_folder import MARK, read_stages, write_json
from secateur.pruning.measure.report import Report
from secateur.pruning.measure.row import Row

_PACKAGES = ("torch", "transformers", "lightning")


@dataclass(frozen=True)
class Origin:
    """Origin of a model: base model, command and provenance.

    Args:
        base: Name of the base model, for the model card.
        folder: Its folder.
        fingerprint: Its content hash.
        command: The command that made the model.
        steps: Optimiser steps of its training.
        provenance: How the model was pruned, by method: JSON values only.
        training: How its weights were trained: JSON values only.
    """

    base: str
    folder: Path
    fingerprint: str
    command: str = ""
    steps: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def base_model(self) -> BaseModel:
        """The base model."""
        return BaseModel(self.folder)

    @property
    def name(self) -> str:
        """Name of the base model for others: of a folder its name, of ours that of its own base."""
        if stages := read_stages(self.folder):
            return str(stages[0]["base"])
        return Path(self.base).absolute().name if Path(self.base).exists() else self.base

    def described(self) -> str:
        """Name of the base model with its size and family, as a folder may be called anything."""
        size = short_count(self.base_model.skeleton().num_parameters())
        return f"{self.name} ({self.base_model.config.model_type}, {size} parameters)"

    @property
    def shown_command(self) -> str:
        """The command with the names of folders and files instead of their places on a disk."""
        return shlex.join(_without_place(word) for word in shlex.split(self.command))

    @staticmethod
    def versions() -> dict[str, str]:
        """Package to version."""
        return {"secateur": __version__} | {name: version(name) for name in _PACKAGES}

    @property
    def made(self) -> str:
        """Heading of the new model in tables: `pruned`, or `trained` if nothing was pruned."""
        return "pruned" if self.provenance else "trained"


def short_count(count: int) -> str:
    """A number of parameters for people: `260k`, `135M`, `6.7B`."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            value = count / unit
            return f"{value:.0f}{letter}" if value >= 10 else f"{value:.1f}{letter}"
    return str(count)


def _without_place(word: str) -> str:
    """A word of a command; of a path on this disk, alone or behind `=`, the last part."""
    name, equals, value = word.rpartition("=")
    path = Path(value)
    if len(path.parts) < 2 or not (path.is_absolute() or path.exists()):
        return word
    return f"{name}{equals}{path.name}"


def write_mark(folder: Path, origin: Origin, report: Report | None) -> list[dict[str, Any]]:
    """Write `secateur.json` into a model folder that lacks only this file and README.md.

    It contains no times, so that equal runs write equal files.

    Args:
        folder: The model folder.
        origin: Where the model came from.
        report: Base model and new model side by side; None if they were not measured.

    Returns:
        All stages that led to the model; those of the base model come first.
    """
    stages = read_stages(origin.folder)
    if report is not None:
        stage = {
            "base": origin.name,
            "base_fingerprint": origin.fingerprint,
            "command": origin.shown_command,
            "steps": origin.steps,
            "provenance": dict(origin.provenance),
            "training": dict(origin.training),
            "context_tokens": report.context_tokens,
            "models": {row.name: figures(row, report.context_tokens) for row in report.rows},
        }
        stages = [*stages, stage]
    files = sorted({path.name for path in folder.iterdir()} | {MARK, "README.md"})
    mark = {
        "command": origin.shown_command,
        "steps": origin.steps,
        "stages": stages,
        "files": files,
        "fingerprint": fingerprint(folder),
    }
    write_json(folder / MARK, mark)
    return stages


def plain(text: str) -> str:
    """Keep a name from being read as Markdown, HTML or a new line."""
    return re.sub(r"[`<>\[\]|\x00-\x1f\x7f]", " ", text)


def stages_table(stages: list[dict[str, Any]]) -> list[list[str]]:
    """Make a table of the stages: the first dense model and the result of each stage."""
    table = [["model", "parameters", "FLOPs per token", "perplexity"]]
    for number, stage in enumerate(stages, start=1):
        dense, made = list(stage["models"].values())[:2]
        first = [(f"`{plain(stage['base'])}`", dense)] if number == 1 else []
        made_by = plain(", ".join(stage["provenance"])) or "training"
        for name, of_model in [*first, (f"stage {number}: {made_by}", made)]:
            quality = " / ".join(f"{value:.3f}" for value in of_model["perplexity"].values())
            flops = f"{of_model['flops_per_token']:,} at {stage['context_tokens']} tokens"
            table.append([name, f"{of_model['parameters']:,}", flops, quality])
    return table


def figures(row: Row, context_tokens: int) -> dict[str, Any]:
    """Sizes and perplexities of a measured model: JSON values only."""
    return {
        "parameters": row.counts.parameters,
        "flops_per_token": row.counts.flops_per_token(context_tokens),
        "perplexity": {text: round(found.value, 4) for text, found in row.perplexity.items()},
    }
