"""Export a model: write, verify, measure and describe it.

All kinds of pruning export through `deliver`. What is written (`sources`) and by which ranks
(`ranks`) are independent choices; the steps and their order are always the same.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.pruning.export.model_card import card
from secateur.pruning.export.publish import publish
from secateur.pruning.export.ranks import OneRank, Ranks
from secateur.pruning.export.sources import FromFiles, Source
from secateur.pruning.export.stages import Origin, write_mark
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.model_folder import (
    is_plan,
    refuse_base,
    refuse_foreign,
    replaced_folder,
)
from secateur.pruning.measure.report import Report
from secateur.pruning.plan import Plan


def deliver(
    what: Source, origin: Origin, folder: Path, windows_NT: Tensor, ranks: Ranks, measured: bool
) -> Report | None:
    """Write a model, verify it, measure it beside its base model, and describe it.

    The folder appears only after all steps succeeded; on a failure it is removed, and an earlier
    export in its place is kept. `report.json`, `report.md` and `report.html` are written beside it,
    and, for a cut model, `plan/` and a picture of the widths.

    Args:
        what: What is exported.
        origin: Base model, command and provenance.
        folder: Folder to write.
        windows_NT: Token windows (int64) to verify and measure on.
        ranks: The participating ranks; every one calls this function.
        measured: Whether to measure and report; the model is always verified.

    Returns:
        The report, None if nothing was measured.

    Raises:
        ValueError: The plan does not fit the base model, `folder` holds what Secateur did not
            write, or (`ExportError`) the exported model computes something else.
        OSError: Reading or writing failed, for example because the disk is full.
    """
    refuse_base(folder, origin.folder)
    with ExitStack() as stack:
        stack.enter_context(what.ready())
        prove = what.proof(origin, ranks.share(windows_NT), ranks.device)

        def enter() -> Path | None:
            return stack.enter_context(replaced_folder(folder)) if ranks.first else None

        partial = ranks.together(enter)[0]
        assert partial is not None
        ranks.together(lambda: what.write(partial if ranks.first else None, origin))
        ranks.together(lambda: prove(partial))
        report = None
        if measured:
            dense = origin.folder if what.dense is None else what.dense
            report = ranks.measure(dense, partial, origin.made, windows_NT)

        def describe() -> None:
            if ranks.first:
                stages = write_mark(partial, origin, report)
                text = card(origin, report, what.plan, stages, what.proven)
                (partial / "README.md").write_text(text, encoding="utf-8")

        ranks.together(describe)

    def tell() -> None:
        if ranks.first and report is not None:
            publish(report, what.plan, origin, folder)

    ranks.together(tell)
    return report


def export(
    base_folder: str | Path,
    plan: Plan,
    folder: str | Path,
    model: PreTrainedModel | None = None,
    windows_BT: Tensor | None = None,
) -> None:
    """Write the smaller model that a plan leaves of a model folder, and verify it.

    Args:
        base_folder: Folder of the base model.
        plan: The kept indices.
        folder: Folder of the smaller model.
        model: The live base model to compare with; None loads it from `base_folder`.
        windows_BT: Token ids to compare on; None draws 2 windows of up to 64 random tokens.

    Raises:
        ValueError: As for `deliver`.
        OSError: As for `deliver`.
    """
    base_folder = Path(base_folder)
    if model is None:
        model = BaseModel(base_folder).load()
    if windows_BT is None:
        windows_BT = _random_windows(model.config)
    origin = Origin(
        str(base_folder), base_folder, plan.base, provenance={"masks": dict(plan.provenance)}
    )
    one = OneRank(base_folder, model.device)
    deliver(FromFiles(plan, model), origin, Path(folder), windows_BT, one, measured=False)


def check_folder(folder: Path, base_folder: Path | None) -> None:
    """Check, before a run, that an export could be written to a folder.

    Args:
        folder: Folder of the model; a plan goes to `plan` beside it.
        base_folder: Folder of the base model; None if training starts from random weights.

    Raises:
        ValueError: It is the base model, or holds files that Secateur did not write.
    """
    if base_folder is not None:
        refuse_base(folder, base_folder)
    refuse_foreign(folder)
    refuse_foreign(folder.parent / "plan", is_plan)


def _random_windows(config: PreTrainedConfig) -> Tensor:
    length = min(64, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, length), generator=generator)
