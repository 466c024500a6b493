"""Scores on disk: computed once per model, text and settings, and reused for later targets.

Each result is a JSON file, which is read again, and a CSV file of the same numbers for people. Its
name is the hash of everything that the scores depend on: weights and configuration of the live
model (which differ once it was trained or shortened), token ids, the score with its settings, and
the units.

Legend: U = units, L = blocks, N = windows, T = tokens of a window.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.depth.scores import BlockScore, BlockScores
from secateur.pruning.depth.units import Unit
from secateur.pruning.files.fingerprint import data_fingerprint, live_fingerprint

_log = logging.getLogger(__name__)
_FORMAT = "secateur-block-scores-1"


class Cached(BlockScore):
    """A score that stores its results on disk.

    Args:
        score: The score.
        folder: Folder of the results; created if needed.
    """

    def __init__(self, score: BlockScore, folder: str | Path) -> None:
        self.score = score
        self.folder = Path(folder)
        self.reads_text = score.reads_text

    def __repr__(self) -> str:
        return f"Cached({self.score!r}, {str(self.folder)!r})"

    def _score(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"], units: tuple[Unit, ...]
    ) -> BlockScores:
        key = {
            "model": live_fingerprint(model),
            "data": data_fingerprint(windows_NT) if self.reads_text else None,
            "score": repr(self.score),
            "units": [unit.key for unit in units],
        }
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        path = self.folder / f"{type(self.score).__name__.lower()}-{digest}.json"
        if path.is_file():
            _log.info("Scores of blocks are read from %s.", path)
            return load_scores(path)
        scores = self.score(model, windows_NT if self.reads_text else None, units)
        save_scores(scores, path, key)
        return scores


def save_scores(scores: BlockScores, path: Path, key: dict[str, Any] | None = None) -> None:
    """Write scores as JSON, and as CSV beside it.

    Args:
        scores: The scores.
        path: The JSON file; its folder is created if needed.
        key: What the scores depend on, as information; JSON values.
    """
    errors = scores.errors
    content = {
        "format": _FORMAT,
        "key": key or {},
        "units": [[unit.block, unit.part] for unit in scores.units],
        "values": scores.values.tolist(),
        "errors": None if errors is None else errors.tolist(),
        "runs": None if scores.runs is None else [_nulls(row_L) for row_L in scores.runs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["unit", "score", "standard_error"])
    for index, unit in enumerate(scores.units):
        error = "" if errors is None else repr(float(errors[index]))
        writer.writerow([unit.key, repr(float(scores.values[index])), error])
    path.with_suffix(".csv").write_text(table.getvalue(), encoding="utf-8")
    # The JSON file appears complete or not at all: another run may read it.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load_scores(path: Path) -> BlockScores:
    """Read scores that `save_scores` wrote, exactly.

    Raises:
        ValueError: The file is not a file of scores, or is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {_FORMAT!r}")
        runs, errors = content["runs"], content["errors"]
        return BlockScores(
            torch.tensor(content["values"], dtype=torch.float64),
            None if errors is None else torch.tensor(errors, dtype=torch.float64),
            tuple(Unit(block, part) for block, part in content["units"]),
            None
            if runs is None
            else torch.tensor([_numbers(row) for row in runs], dtype=torch.float64),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no readable scores: {error}. Delete it.") from error


def _nulls(row_L: Float[Tensor, " L"]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in row_L.tolist()]


def _numbers(row: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in row]
