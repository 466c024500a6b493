"""Quality of the sizes of a family against runs for one size alone, at the same cost per model.

Model, texts and settings are those of `disp_quality.py`, recipe `frozen`. A run for one size learns
masks for some steps and trains the cut model for the others. The family learns masks once, for as
many steps as all these runs together, and trains each cut model for as many steps as they do; the
ranking by importance, which every single run makes, it makes once. Excess is ln(perplexity) -
ln(dense perplexity) in nats, the mean over the three texts; `worst_over_single` is the largest
ratio of the excess of a size to that of its single run, over sizes whose single run has any.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import data_folder, write_figures
from benchmarks.disp_quality import common, excess, perplexities
from secateur.family import make_family
from secateur.program import train
from secateur.pruning.widths.sizes import Sizes

MASK_SHARE = 1 / 7  # of the steps of a model, as in `frozen`: 100 of 700
_CALLBACKS = json.dumps(
    [
        {"class_path": "AnnealSparsity", "init_args": {"over": 0.0}},
        {"class_path": "SaveCheckpoint"},
        {"class_path": "ExportModel"},
    ]
)


def settings(model: str, seed: int, root: Path, extra: Sequence[str]) -> list[str]:
    """Arguments of train.py that single runs and families share."""
    return [
        "--config=configs/disp.yaml",
        *common(model, seed, root),
        f"--model.sampler.seed={seed}",
        f"--model.hypernetwork.seed={seed}",
        f"--model.learning.start.seed={seed}",
        f"--trainer.callbacks={_CALLBACKS}",
        *extra,
    ]


def timed(make: Callable[[], object]) -> float:
    """CPU seconds of a call, exports and reports included."""
    begin = time.process_time()
    make()
    return time.process_time() - begin


def compare(
    keeps: Sequence[float], steps: int, seed: int, model: str, root: Path, extra: Sequence[str]
) -> dict[str, Any]:
    """Make the family and the single runs; measure all exported models.

    Args:
        keeps: Sizes, the largest first.
        steps: Optimiser steps per model, 2 or more.
        seed: Seed of everything.
        model: Folder of the dense model.
        root: Folder for the runs.
        extra: Further settings of train.py.
    """
    mask_steps = max(1, round(steps * MASK_SHARE))
    settle_steps = steps - mask_steps
    of_family = settings(model, seed, root / "family", extra)
    figures: dict[str, Any] = {"mask_steps": mask_steps, "settle_steps": settle_steps}
    figures["family_seconds"] = timed(
        lambda: make_family(Sizes(keeps, seed), mask_steps * len(keeps), settle_steps, of_family)
    )
    figures["single_seconds"] = 0.0
    dense, _ = perplexities(model, model)
    for keep in keeps:
        alone = [
            "fit",
            *settings(model, seed, root / f"single_{keep}", extra),
            f"--model.budget.keep={keep}",
            f"--model.settle.fraction={settle_steps / steps}",
            f"--trainer.max_steps={steps}",
        ]
        figures["single_seconds"] += timed(lambda arguments=alone: train(arguments))  # type: ignore[misc]
        for kind, folder in (("family", f"family/keep_{keep}"), ("single", f"single_{keep}")):
            found, _ = perplexities(root / folder / "model", model)
            figures[f"{kind}_excess_{keep}"] = statistics.mean(excess(found, dense).values())
    figures["cost_over_single"] = figures["family_seconds"] / figures["single_seconds"]
    return figures | over_single(figures, keeps)


def over_single(figures: dict[str, Any], keeps: Sequence[float]) -> dict[str, float]:
    """Ratios of the excess of every size to that of its single run, where that has any."""
    ratios = {
        f"over_single_{keep}": figures[f"family_excess_{keep}"] / alone
        for keep in keeps
        if (alone := figures[f"single_excess_{keep}"]) > 0
    }
    return ratios | {"worst_over_single": max(ratios.values())} if ratios else {}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Unknown options are passed to train.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.65, 0.5], help="sizes")
    add("--steps", type=int, default=700, help="steps per model (default: 700)")
    add("--seed", type=int, default=0, help="seed (default: 0)")
    add("--model", help="model folder (default: llama7m_mha of the data)")
    add("--keep-runs", type=Path, help="folder for the runs (default: temporary)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--json", type=Path, help="write the figures to this file")
    args, extra = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    model = args.model or str(data_folder() / "models" / "llama7m_mha")
    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep_runs or Path(temporary)
        figures = compare(args.keep, args.steps, args.seed, model, root, extra)
    write_figures(figures | {"seed": args.seed, "threads": args.threads}, args.json)


if __name__ == "__main__":
    main()
