"""Quality of smaller models for a budget against the reference implementation of DISP-LLM.

Runs `python train.py fit` with a recipe on the mask-training text (batch 8 x 256 tokens, fp32),
loads the exported folder, and measures perplexity on the first 200 windows of three texts. Excess
is ln(perplexity) - ln(dense perplexity) in nats; the figure of merit is the mean excess over the
three texts divided by that of the reference's released code after 1000 steps, measured on the same
model, texts and windows. The budget is counted on the exported model. Cost is the time of the run
over that of the reference's 1000 steps, which is that of 1130 plain steps; plain steps are timed in
the same process (`plain_steps.py`).

Recipes: `masks` only learns masks; `frozen` trains no weights (masks by importance, refit, gains);
`recovered` trains weights of the cut model; `quick` does so in a quarter of the reference's time;
`untrained` makes no training steps: importance (`PruneWidths`, `Fisher`) and refit.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.data import WINDOW_TOKENS, data_folder, evaluation_windows, write_figures
from benchmarks.plain_steps import BATCH_SIZE, PlainSteps, clock_of, timed_refits
from secateur.program import train
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.measure.sizes import count

FIRST_WINDOWS = 200
# Perplexities of the reference after 1000 steps (c4, wikitext2, tinystories), by kept fraction.
REFERENCE = {
    0.5: (125.8, 284.0, 56.3),
    0.3: (160.4, 349.5, 82.4),
    0.8: (108.0, 251.2, 43.0),
}
REFERENCE_PLAIN_STEPS = 1130  # the time of its 1000 steps
REFIT_WINDOWS = 512  # of the recipes that train no weights


@dataclass(frozen=True)
class Recipe:
    """A recipe for a smaller model.

    Args:
        key: Name of its figure, before `_over_reference`.
        mask_steps: Steps in which masks are learned.
        settled_steps: Steps in which the cut model trains.
        settings: Further settings of train.py.
    """

    key: str
    mask_steps: int = 0
    settled_steps: int = 0
    settings: tuple[str, ...] = ()

    def arguments(self, model: str, keep: float, seed: int, steps: int | None) -> list[str]:
        """Arguments of train.py; `steps` replaces the recipe's total, in the same proportion."""
        total = self.mask_steps + self.settled_steps
        clock = callback(f"{PlainSteps.__module__}.{PlainSteps.__name__}", model=model)
        if not total:
            first = callback(
                "PruneWidths",
                budget={"keep": keep},
                calibration_windows=REFIT_WINDOWS,
                calibration_seed=seed,
            )
            own = ["--config=configs/widths/importance.yaml"]
        else:
            # The initial ranking of the gates meets the budget.
            first = callback("AnnealSparsity", over=0.0)
            own = [
                "--config=configs/disp.yaml",
                f"--model.budget.keep={keep}",
                f"--model.sampler.seed={seed}",
                f"--model.hypernetwork.seed={seed}",
                f"--model.learning.start.seed={seed}",
            ]
            if self.settled_steps:
                own.append(f"--model.settle.fraction={self.settled_steps / total}")
        callbacks = json.dumps([first, clock, callback("ExportModel")])
        return [
            *own,
            f"--trainer.callbacks={callbacks}",
            f"--trainer.max_steps={total if steps is None else steps}",
            *self.settings,
        ]


# Of what exchanges gain little is left after a refit on this model: steps are worth more.
RANKED = "--model.learning.start.search=GradualRanking"
ALL_WEIGHTS = (RANKED, "--model.settle.train=AllWeights")
RECIPES = {
    "masks": Recipe("masks", 1000, 0, ("--model.settle=null",)),
    "frozen": Recipe("excess", 0, 640, (RANKED, f"--model.settle.refit_windows={REFIT_WINDOWS}")),
    "recovered": Recipe("recovered", 0, 690, ALL_WEIGHTS),
    "quick": Recipe("quick", 0, 120, ALL_WEIGHTS),
    "untrained": Recipe("untrained"),
}


def callback(class_path: str, **init_args: Any) -> dict[str, Any]:
    """An entry of `trainer.callbacks`."""
    return {"class_path": class_path, "init_args": init_args}


def excess(of: dict[str, float], dense: dict[str, float]) -> dict[str, float]:
    """Nats over the dense model, text by text."""
    return {name: math.log(of[name]) - math.log(dense[name]) for name in dense}


def perplexities(folder: Path | str, tokenizer: str) -> tuple[dict[str, float], int]:
    """Perplexity of every text, and the parameters of the block projections."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    texts = evaluation_windows(tokenizer, FIRST_WINDOWS)
    values = {name: perplexity(model, windows, 20).value for name, windows in texts.items()}
    return values, count(model).block_projection_parameters


def common(model: str, seed: int, root: Path) -> list[str]:
    """Arguments of train.py that every run of the protocol has, behind its `--config`."""
    return [
        f"--seed_everything={seed}",
        f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        f"--model.base={model}",
        f"--data.train={data_folder() / 'text' / 'c4_masktrain.json'}",
        f"--data.validation={data_folder() / 'text' / 'c4_heldout.json'}",
        f"--data.window_tokens={WINDOW_TOKENS}",
        f"--data.batch_size={BATCH_SIZE}",
        "--data.validation_windows=8",
        f"--data.seed={seed}",
    ]


def run(arguments: list[str], model: str, seed: int, root: Path) -> dict[str, float]:
    """Run the command line once; return its cost."""
    with timed_refits() as refits:
        program = train(["fit", *arguments[:1], *common(model, seed, root), *arguments[1:]])
    clock = clock_of(program.trainer)
    figures = {
        "cost_over_reference": clock.steps / REFERENCE_PLAIN_STEPS,
        "plain_steps": clock.steps,
        "plain_step_seconds": clock.step_seconds,
    }
    if refits:
        figures["refit_plain_steps"] = sum(refits) / clock.step_seconds
    return figures


def main() -> None:
    """Run a recipe, export and measure, seed by seed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Unknown options are passed to train.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", choices=RECIPES, default="frozen", help="way (default: frozen)")
    parser.add_argument("--kept", type=float, default=0.5, help="kept fraction of block FLOPs")
    parser.add_argument("--steps", type=int, help="steps in place of the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed")
    parser.add_argument("--model", help="model folder (default: llama7m_mha of the data)")
    parser.add_argument("--keep-runs", type=Path, help="folder for the runs (default: temporary)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args, extra = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.recipe]
    model = args.model or str(data_folder() / "models" / "llama7m_mha")
    dense, dense_parameters = perplexities(model, model)

    runs: dict[int, dict[str, float]] = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            root = (args.keep_runs or Path(temporary)) / f"{args.recipe}{args.kept}_seed{seed}"
            arguments = [*recipe.arguments(model, args.kept, seed, args.steps), *extra]
            own = run(arguments, model, seed, root)
            found, parameters = perplexities(root / "model", model)
        own |= {f"perplexity_{name}": value for name, value in found.items()}
        own["mean_excess"] = statistics.mean(excess(found, dense).values())
        own["kept_counted"] = parameters / dense_parameters
        if args.kept in REFERENCE and args.model is None:  # it was measured on one model
            theirs = excess(dict(zip(dense, REFERENCE[args.kept], strict=True)), dense)
            own[f"{recipe.key}_over_reference"] = own["mean_excess"] / statistics.mean(
                theirs.values()
            )
        runs[seed] = own
    figures: dict[str, Any] = {"recipe": args.recipe, "kept_asked": args.kept}
    figures |= {f"{k}_seed{seed}": value for seed, own in runs.items() for k, value in own.items()}
    for key in next(iter(runs.values())):
        values = [own[key] for own in runs.values()]
        figures |= {key: statistics.mean(values), f"{key}_spread": max(values) - min(values)}
    figures["threads"] = args.threads
    write_figures(figures, args.json)


if __name__ == "__main__":
    main()
