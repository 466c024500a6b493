"""Learn masks once for several sizes of a model, and make each of them: runs of `fit` in a row.

As a command: `python -m secateur family --help`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from secateur import named_callbacks
from secateur.program import train
from secateur.pruning.commands import CommandParser, UsageError, typed_command
from secateur.pruning.export.ranks import speed_settings
from secateur.pruning.export.stages import Origin
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.checkpoints import latest_checkpoint
from secateur.pruning.measure.generation import prompts_for
from secateur.pruning.measure.pareto import family_page
from secateur.pruning.measure.report import Report, measure
from secateur.pruning.plan import Plan
from secateur.pruning.widths.sizes import Sizes, check_nested

if TYPE_CHECKING:
    from secateur.command_line import TrainCLI

_HELP = """\
Learn masks once for several sizes of a model, and make each of them.

While masks are learned, every step has one of the budgets. Then the ranking of the last step is cut
at each budget, so that what a size keeps, the larger ones keep, too; each is refitted, trained and
exported by itself. All other options are those of `fit`; the same command goes on where it was.

  ROOT/masks/          the run that learns masks
  ROOT/keep_0.8/       a run per size, with model/, plan/ and report.html
  ROOT/report.html     all sizes side by side: quality against FLOPs, size, memory and time

ROOT is --trainer.default_root_dir.

example:
  python -m secateur family --keep 0.9 0.8 0.65 0.5 --mask-steps 400 --settle-steps 300 \\
      --config configs/disp.yaml --model.base MODEL --data.train texts.json \\
      --trainer.default_root_dir runs/family
"""
_SAVES, _EXPORTS = "SaveCheckpoint", "ExportModel"


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = CommandParser("family", _HELP)
    add = parser.add_argument
    add(
        "--keep", nargs="+", type=float, required=True, metavar="FRACTION",
        help="fractions of the cost to keep, in (0, 1), the largest first",
    )  # fmt: skip
    add("--mask-steps", type=int, required=True, help="steps that learn masks, for all sizes")
    add("--settle-steps", type=int, required=True, help="steps that train each cut model")
    args, fit = parser.parse_known_args([*arguments])
    for name, value in (("--mask-steps", args.mask_steps), ("--settle-steps", args.settle_steps)):
        if value < 0:
            parser.error(f"`{name}` must be 0 or more, got {value}")
    with parser.naming():
        sizes = Sizes(args.keep)
    make_family(sizes, args.mask_steps, args.settle_steps, fit)


def make_family(
    sizes: Sizes, mask_steps: int, settle_steps: int, fit: Sequence[str]
) -> Report | None:
    """Learn masks for several sizes, make each, and measure them beside the dense model.

    Args:
        sizes: The sizes.
        mask_steps: Optimiser steps that learn masks, 0 or more; 0 cuts the initial ranking.
        settle_steps: Optimiser steps that train each cut model, 0 or more.
        fit: Arguments of `fit`, without its name.

    Returns:
        All models side by side; None on ranks other than the first.

    Raises:
        UsageError: A setting does not exist, or a callback that is needed is missing.
        ValueError: As for the runs; or earlier results in the folder are those of another family.
    """
    fit = named_callbacks.resolve(fit)
    tree = named_callbacks.read(fit)
    callbacks = named_callbacks.callbacks_of(tree)
    named = {named_callbacks.name_of(callback): callback for callback in callbacks}
    if missing := [name for name in (_SAVES, _EXPORTS) if name not in named]:
        raise UsageError(
            f"`--trainer.callbacks` lacks {missing[0]}: a family needs {_SAVES} and {_EXPORTS}."
        )
    root = Path(_typed(tree.get("trainer", {}), "default_root_dir", "runs/family"))
    model_folder = _typed(named[_EXPORTS], "folder", "model")
    shared = ["fit", *fit, f"--model.learning.sizes={json.dumps(asdict(sizes))}"]
    train(
        [
            *shared,
            named_callbacks.as_option(own for name, own in named.items() if name != _EXPORTS),
            f"--model.budget.keep={sizes.keep[-1]}",
            "--model.settle.fraction=0",
            f"--trainer.max_steps={mask_steps}",
            f"--trainer.default_root_dir={root / 'masks'}",
            "--ckpt_path=last",
        ]
    )
    learned = latest_checkpoint(root / "masks")
    total = mask_steps + settle_steps
    folders = {f"keep {keep}": root / f"keep_{keep}" for keep in sizes.keep}
    for keep, folder in zip(sizes.keep, folders.values(), strict=True):
        run = train(
            [
                *shared,
                f"--model.budget.keep={keep}",
                f"--model.settle.fraction={settle_steps / total if total else 0.0}",
                f"--trainer.max_steps={total}",
                f"--trainer.default_root_dir={folder}",
                f"--ckpt_path={latest_checkpoint(folder) or learned}",
            ]
        )
    if not run.trainer.is_global_zero:
        return None
    check_nested({name: Plan.load(folder / "plan") for name, folder in folders.items()})
    report = _measured(run, {name: folder / model_folder for name, folder in folders.items()})
    facts = {
        "sizes": " ".join(map(str, sizes.keep)),
        "steps that learn masks": f"{mask_steps:,} for all sizes",
        "steps that train a cut model": f"{settle_steps:,} for each",
    }
    _publish(report, run, facts, root)
    return report


def _typed(node: Any, name: str, default: str) -> str:
    """A setting as it was typed, or its default."""
    leaf = node.get(name)
    return default if leaf is None else str(leaf.value)


def _measured(run: TrainCLI, folders: Mapping[str, Path]) -> Report:
    """All sizes beside the dense model, on the validation text of the runs."""
    data: Any = run.datamodule
    module: Any = run.model
    windows_NT = torch.stack([data.validation_set[n] for n in range(len(data.validation_set))])
    places = {"dense": module.base_folder} | dict(folders)
    device = run.trainer.strategy.root_device
    models = {name: BaseModel(folder).load("auto", device) for name, folder in places.items()}
    return measure(
        models,
        {"validation": windows_NT},
        places,
        speed=speed_settings(windows_NT),
        tokenizer=data.tokenizer,
        prompts=prompts_for(data.tokenizer, windows_NT),
        latency=module.budget.cost.times,
    )


def _publish(report: Report, run: TrainCLI, facts: Mapping[str, str], root: Path) -> None:
    """Write the report into the folder of the family, and show it."""
    module: Any = run.model
    command = typed_command(sys.argv)
    origin = Origin(module.base, module.base_folder, module.base_fingerprint, command)
    told = {"base model": origin.described(), "fingerprint of the base": origin.fingerprint}
    told |= {**facts, "command": origin.shown_command, **origin.versions()}
    title = f"{len(report.rows) - 1} sizes of {origin.described()}"
    page = family_page(title, report, told)
    (root / "report.json").write_text(report.json(), encoding="utf-8")
    (root / "report.md").write_text(report.markdown(), encoding="utf-8")
    (root / "report.html").write_text(page.render(), encoding="utf-8")
    report.show(Console())
    Console().print(f"The sizes are in {root}/keep_*/. Report: {root}/report.html", soft_wrap=True)
