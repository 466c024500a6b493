"""Deliver a model that no rank can hold: the files are streamed, and every rank proves a part.

One rank cuts the files of the base model, or writes what all gather. Then each compares and
measures windows of its own, on models that stay in their files (pruning/export/streamed.py),
so that beside its share of the model in training a rank holds one layer and the activations of a
window.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed
from transformers import PreTrainedModel

from secateur.pruning.export.delivery import (
    Origin,
    card,
    forget_alignment,
    is_plan,
    is_trained,
    publish,
    weights_card,
    write_mark,
)
from secateur.pruning.export.gathered_weights import num_parameters
from secateur.pruning.export.rewrite import write_pruned
from secateur.pruning.export.streamed import streamed, verify_recorded, verify_streamed
from secateur.pruning.export.verify import ExportError, record
from secateur.pruning.files.model_folder import is_pruned_model, replaced_folder
from secateur.pruning.measure.perplexity import of_windows, window_nll
from secateur.pruning.measure.plots import plot_widths
from secateur.pruning.measure.report import Report, Row, count, file_bytes
from secateur.pruning.plan import Plan

T = TypeVar("T")
_BATCH = 8  # windows that a model, read anew for each batch, sees at once


def deliver_together(
    plan: Plan,
    base: str,
    base_folder: Path,
    folder: Path,
    windows_NT: Tensor,
    command: str,
    device: torch.device,
) -> None:
    """Export a plan, compare the result with the dense model, and write everything down.

    Every rank has to call it. Speed is not measured: a model that streams from its files, or in
    shares, has not the speed that it is served at.

    Args:
        plan: What stays.
        base: Name of the base model, for the model card.
        base_folder: Its folder, which every rank can read.
        folder: Where the smaller model goes; every rank can read what the first one writes there.
        windows_NT: Token windows (int64) to verify and measure on.
        command: The command that made the model.
        device: Where this rank computes.

    Raises:
        ValueError: The exported model is not the masked one, or `folder` holds something else; the
            message says which rank found out.
    """
    origin = Origin(
        base,
        base_folder,
        plan.base,
        command,
        plan.provenance.get("step", 0),
        {"masks": dict(plan.provenance)},
    )

    def write(partial: Path | None) -> None:
        if partial is not None:
            write_pruned(base_folder, plan, partial)

    def verify(partial: Path) -> None:
        verify_streamed(base_folder, plan, partial, _mine(windows_NT), device)

    def describe(partial: Path, report: Report, stages: list[dict[str, Any]]) -> str:
        with streamed(base_folder, device) as dense:
            return card(report, plan, dense, origin, stages).render(plan)

    def finish() -> None:
        if distributed.get_rank() == 0:
            forget_alignment(folder)
            with replaced_folder(folder.parent / "plan", is_plan) as of_plan:
                plan.save(of_plan)
            plot_widths(plan, folder.parent / "plots" / "widths.png")

    steps = _Steps(write, verify, describe)
    _deliver(steps, origin, "pruned", folder, is_pruned_model, windows_NT, device)
    together(finish)


def deliver_weights_together(
    model: PreTrainedModel,
    origin: Origin,
    write: Callable[[Path | None], None],
    folder: Path,
    windows_NT: Tensor,
    device: torch.device,
) -> None:
    """Save a model in shares whose own weights were trained; else as `deliver_together`.

    Args:
        model: The live model, in evaluation mode, which the saved one has to equal.
        origin: Where the model came from.
        write: Writes weights, configuration and tokenizer into an empty folder; called on every
            rank, with None on those that are to write nothing.
        folder: Where the model goes; every rank can read what the first one writes there.
        windows_NT: Token windows (int64) to verify and measure on.
        device: Where this rank computes.

    Raises:
        ValueError: The saved model is not the live one, or `folder` holds something else; the
            message says which rank found out.
    """
    # Now, as the ranks compute together: one that finds a difference later leaves no other waiting.
    said, parameters = record(model, _mine(windows_NT).to(device)), num_parameters(model)

    def verify(partial: Path) -> None:
        verify_recorded(said, parameters, model.dtype, partial, device)

    def describe(partial: Path, report: Report, stages: list[dict[str, Any]]) -> str:
        return weights_card(report, origin, stages, None)

    name = "pruned" if origin.provenance else "trained"
    steps = _Steps(write, verify, describe)
    _deliver(steps, origin, name, folder, is_trained, windows_NT, device)


@dataclass(frozen=True)
class _Steps:
    """What is done with an export.

    Args:
        write: Writes it into an empty folder; on every rank, with None on all but the first.
        verify: Proves what lies in the folder; on every rank.
        describe: The text of the model card; on the first.
    """

    write: Callable[[Path | None], None]
    verify: Callable[[Path], object]
    describe: Callable[[Path, Report, list[dict[str, Any]]], str]


def _deliver(
    steps: _Steps,
    origin: Origin,
    name: str,
    folder: Path,
    is_ours: Callable[[Path], bool],
    windows_NT: Tensor,
    device: torch.device,
) -> None:
    """Write, prove, measure and describe: the folder is there when all of it went well."""
    first = distributed.get_rank() == 0
    with ExitStack() as stack:

        def enter() -> Path | None:
            return stack.enter_context(replaced_folder(folder, is_ours)) if first else None

        partial = together(enter)[0]
        assert partial is not None
        together(lambda: steps.write(partial if first else None))
        together(lambda: steps.verify(partial))
        report = _measure({"dense": origin.folder, name: partial}, windows_NT, device)

        def describe() -> None:
            if first:
                stages = write_mark(partial, origin, report)
                text = steps.describe(partial, report, stages)
                (partial / "README.md").write_text(text, encoding="utf-8")

        together(describe)
    together(lambda: publish(report, folder) if first else None)


def _mine(windows_NT: Tensor) -> Tensor:
    """The window that this rank compares two models on."""
    rank = distributed.get_rank() % len(windows_NT)
    return windows_NT[rank : rank + 1]


def together(work: Callable[[], T]) -> list[T]:
    """Do something on every rank; what fails on one fails on all, so that nobody waits in vain.

    Returns:
        What it gave, rank by rank.

    Raises:
        ExportError: A rank met a ValueError, an OSError or a full disk.
    """
    mine: tuple[Any, str | None]
    try:
        mine = work(), None
    except (OSError, ValueError, SafetensorError) as error:
        mine = None, f"{type(error).__name__}: {error}"
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, mine)
    failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(every) if error]
    if failed:
        raise ExportError("\n".join(failed))
    return [result for result, _ in every]


def _measure(folders: dict[str, Path], windows_NT: Tensor, device: torch.device) -> Report:
    """Models side by side, every rank on windows of its own; the dense one comes first."""
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    rows, dtype = [], None
    for name, folder in folders.items():
        with streamed(folder, device, trust_remote_code=name != "dense") as model:

            @torch.inference_mode()
            def measure(model: Any = model) -> list[float]:
                batches = (
                    windows_NT[rank::num_ranks].split(_BATCH) if rank < len(windows_NT) else ()
                )
                return [nll for b in batches for nll in window_nll(model, b.to(device)).tolist()]

            nll_N = torch.zeros(len(windows_NT), dtype=torch.float64)
            for other, of_rank in enumerate(together(measure)):
                nll_N[other::num_ranks] = torch.tensor(of_rank, dtype=torch.float64)
            quality = {"validation": of_windows(nll_N, windows_NT.shape[1])}
            rows.append(Row(name, quality, count(model), file_bytes=file_bytes(folder)))
            dtype = dtype or str(model.dtype).removeprefix("torch.")
    conditions = {"device": device.type, "dtype": dtype, "ranks": num_ranks}
    return Report(rows, windows_NT.shape[1], conditions)
