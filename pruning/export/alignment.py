"""Compare quality and speed of widths rounded to a multiple with free widths.

Multiples of 8 to 128 suit matrix hardware, but restrict which entries a plan can keep. Both plans
are exported, loaded and measured side by side, without gains: gains are learned only for the
aligned masks and would bias the comparison.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.export.publish import ALIGNMENT
from secateur.pruning.export.ranks import speed_settings
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure.report import Report, measure
from secateur.pruning.plan import Plan


def compare_alignment(
    dense: PreTrainedModel,
    base_folder: str | Path,
    aligned: Plan,
    free: Plan,
    windows_NT: Int[Tensor, "N T"],
    speed: Mapping[str, int] | None = None,
) -> Report:
    """Measure dense, free and aligned widths of one budget side by side.

    Args:
        dense: The base model, with no gates applied.
        base_folder: Its folder.
        aligned: The plan with a width multiple.
        free: The plan of the same budget and scores without one.
        windows_NT: Token windows to measure perplexity on.
        speed: Settings of `measure_speed` besides its models; None skips this measurement.

    Raises:
        ValueError: A plan does not fit the base model.
    """
    models: dict[str, Any] = {"dense": dense}
    with tempfile.TemporaryDirectory() as scratch:
        folders: dict[str, str | Path] = {"dense": base_folder}
        for name, plan in (("free widths", free), ("aligned widths", aligned)):
            folders[name] = Path(scratch) / name
            prune_checkpoint(base_folder, replace(plan, gains=None), folders[name])
            models[name] = BaseModel(Path(folders[name])).load(dense.dtype, dense.device)
        return measure(models, {"validation": windows_NT}, folders, speed=speed)


def report_alignment(
    model: PreTrainedModel,
    aligned: Plan,
    free: Plan,
    base_folder: Path,
    folder: Path,
    windows_NT: Tensor,
) -> Report:
    """Write `alignment.md` and `alignment.json`: cost and benefit of a width multiple.

    Args:
        model: The dense base model, with no gates applied.
        aligned: The plan that was exported.
        free: The plan of the same budget without a width multiple.
        base_folder: Folder of the base model.
        folder: Folder of the smaller model; the files are written beside it.
        windows_NT: Token windows (int64) to measure on.
    """
    speed = speed_settings(windows_NT)
    report = compare_alignment(model, base_folder, aligned, free, windows_NT, speed)
    for name, text in zip(ALIGNMENT, (report.json(), report.markdown()), strict=True):
        (folder.parent / name).write_text(text, encoding="utf-8")
    return report
