"""Deliver a model that no rank can hold: the files are streamed, and every rank proves a part.

One rank cuts the files of the base model. Then each compares and measures windows of its own, on
models that stay in their files (`pruning.export.streamed`), so that beside its share of the model
in training a rank holds one layer and the activations of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from modules.delivery import Origin, card, is_plan, publish, write_mark
from pruning.export.streamed import streamed, verify_streamed
from pruning.export.verify import ExportError
from pruning.measure.perplexity import of_windows, window_nll
from pruning.measure.plots import plot_widths
from pruning.measure.report import Report, Row, count, file_bytes
from pruning.model_folder import replaced_folder
from pruning.plan import PruningPlan
from pruning.surgery import write_pruned

T = TypeVar("T")
_BATCH = 8  # windows that a model, read anew for each batch, sees at once


def deliver_together(
    plan: PruningPlan,
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
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    origin = Origin(
        base,
        base_folder,
        plan.base,
        command,
        plan.provenance.get("step", 0),
        {"masks": dict(plan.provenance)},
    )
    with ExitStack() as stack:

        def write() -> Path | None:
            if rank:
                return None
            partial = stack.enter_context(replaced_folder(folder))
            write_pruned(base_folder, plan, partial)
            return partial

        partial = together(write)[0]
        assert partial is not None
        mine_BT = windows_NT[rank % len(windows_NT) :: num_ranks]
        together(lambda: verify_streamed(base_folder, plan, partial, mine_BT[:1], device))
        report = _measure({"dense": base_folder, "pruned": partial}, windows_NT, device)

        def describe() -> None:
            if rank:
                return
            stages = write_mark(partial, origin, report)
            with streamed(base_folder, device) as dense:
                text = card(report, plan, dense, origin, stages).render(plan)
            (partial / "README.md").write_text(text, encoding="utf-8")

        together(describe)

    def finish() -> None:
        if rank:
            return
        with replaced_folder(folder.parent / "plan", is_plan) as of_plan:
            plan.save(of_plan)
        plot_widths(plan, folder.parent / "plots" / "widths.png")
        publish(report, folder)

    together(finish)


def together(work: Callable[[], T]) -> list[T]:
    """Do something on every rank; what fails on one fails on all, so that nobody waits in vain.

    Returns:
        What it gave, rank by rank.

    Raises:
        ExportError: A rank met a ValueError or an OSError.
    """
    mine: tuple[Any, str | None]
    try:
        mine = work(), None
    except (OSError, ValueError) as error:
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
