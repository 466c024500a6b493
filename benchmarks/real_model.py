"""Quality and speed on a real pretrained model, beside the reference implementation of DISP-LLM.

The model is SmolLM2-135M-Instruct in bfloat16 (`benchmarks/smollm2.py`) unless `--model` names
another folder. Text is cut into windows of 512 tokens, a step has four unless its row says
otherwise. Rows of the figures:

- masks: 200 steps of mask learning only (`--model.settle null`);
- frozen: masks by importance, and gains of the cut model, in steps of one window, in at most the
  time of the reference's 200 steps;
- recovered: the same with all weights in place of gains;
- depth: whole blocks removed, the least influential first, and refitted, without training;
- widths: masks by importance, refitted, without training. The opponent of depth.

Perplexity is that of the first 100 windows of c4 and wikitext2, accuracy that of the first 200
questions of PIQA, ARC-easy and HellaSwag. Excess is ln(perplexity) - ln(dense perplexity) in nats,
the mean of both texts. Times are those of this process on the CPU, in turns. The cost of a run is
its time without the export over that of the reference's, a step of which takes 1.13 plain steps of
four windows (`plain_steps.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.data import (
    data_folder,
    evaluation_windows,
    mask_training_windows,
    write_figures,
)
from benchmarks.disp_quality import callback, excess
from benchmarks.plain_steps import PlainSteps, clock_of
from benchmarks.smollm2 import smollm2_folder
from secateur.program import train
from secateur.pruning.blocks.refit import refit
from secateur.pruning.depth import BlockInfluence, Blocks, OneShot
from secateur.pruning.export.cut import cut
from secateur.pruning.families import PARTS
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.measure.report import count
from secateur.pruning.measure.speed import measure_speed
from secateur.pruning.measure.zero_shot import read_questions, zero_shot
from secateur.pruning.plan import Plan, plan_from_indices, plan_without
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.exchange import Exchange
from secateur.pruning.widths.gate_gradient import Fisher
from secateur.pruning.widths.gradual_ranking import GradualRanking, Ranking

WINDOW_TOKENS, BATCH_SIZE = 512, 4
TASKS = {"piqa": "piqa_val", "arc_easy": "arc_easy_test", "hellaswag": "hellaswag_val_first1500"}
# The released code of DISP-LLM after 200 steps at kept 0.5, measured on this model and these
# windows: gates are kept if P(keep) is 0.5 or more (0.488 of the parameters).
REFERENCE = {"c4": 134.8, "wikitext2": 221.1}
REFERENCE_KEPT, REFERENCE_STEPS, REFERENCE_STEP = 0.5, 200, 1.13  # plain steps of a step
# 16 rounds of ranking and 16 of exchanges, of 8 windows each, take as long as 70 plain steps.
SEARCH = Exchange(GradualRanking(16, 2, BATCH_SIZE), rounds=16, batches_per_round=2)
REFIT_WINDOWS = 128


@dataclass(frozen=True)
class Recipe:
    """Settings of a run of the command line.

    Args:
        steps: Optimiser steps.
        settings: Settings that differ from configs/disp.yaml.
    """

    steps: int
    settings: tuple[str, ...] = ()


# Masks by importance, and a model that trains in steps of one window. A refit on as little text as
# this time allows does harm to masks that were exchanged.
SETTLED = ("--data.batch_size=1", "--model.settle.refit=null", "--model.settle.fraction=1")
# As many steps as fit, with ranking and exchanges, into the time of the reference's 200; of masks
# alone as many as it takes.
RECIPES = {
    "masks": Recipe(200, ("--model.settle=null",)),
    "frozen": Recipe(370, SETTLED),
    "recovered": Recipe(370, (*SETTLED, "--model.settle.train=AllWeights")),
}


class Bench:
    """A dense model, its texts and questions, and the duration of a plain step.

    Args:
        folder: The model.
        items: Number of questions per task, 0 or more.
    """

    def __init__(self, folder: str, items: int) -> None:
        self.folder = folder
        self.dense = self.load(folder)
        texts = evaluation_windows(folder, 100, WINDOW_TOKENS)
        self.texts = {name: texts[name] for name in REFERENCE}
        self.windows_WT = mask_training_windows(folder, window_tokens=WINDOW_TOKENS)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tasks = data_folder() / "tasks"
        self.questions = {
            name: read_questions(tasks / f"{file}.jsonl", tokenizer)[:items]
            for name, file in TASKS.items()
            if items
        }
        self.dense_perplexity = self.perplexities(self.dense)
        self.figures: dict[str, Any] = {}
        self.note("dense", self.dense)

    @staticmethod
    def load(folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
        """The model in a folder, frozen, for evaluation."""
        model = BaseModel(Path(folder)).load(dtype).eval()
        return model.requires_grad_(False)

    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexity of both texts."""
        return {name: perplexity(model, own).value for name, own in self.texts.items()}

    def note(self, name: str, model: PreTrainedModel) -> None:
        """Measure a model; its name ends in the kept fraction."""
        found = self.dense_perplexity if model is self.dense else self.perplexities(model)
        self.figures |= {f"perplexity_{text}_{name}": value for text, value in found.items()}
        for task, questions in self.questions.items():
            self.figures[f"accuracy_{task}_{name}"] = zero_shot(model, questions).accuracy
        if model is not self.dense:
            own = statistics.mean(excess(found, self.dense_perplexity).values())
            self.figures[f"excess_{name}"] = own
            kept = [count(m).block_projection_parameters for m in (model, self.dense)]
            self.figures[f"kept_counted_{name}"] = kept[0] / kept[1]

    def speeds(self, models: dict[str, PreTrainedModel], repeats: int) -> None:
        """Prefill of 4 x 256 tokens and decoding at batch 1, over the dense model."""
        models = {"dense": self.dense, **models}
        for model in models.values():
            # As loaded, with `requires_grad`: for weights without it, `matmul` copies the head for
            # every sequence, which takes longer than the rest of the model.
            model.requires_grad_(True)
        clock = time.process_time
        prefill = measure_speed(models, 4, 256, 2, repeats, clock=clock)
        decode = measure_speed(models, 1, 64, 32, repeats, clock=clock)
        for name in models:
            seconds = prefill[name].prefill_seconds, decode[name].decode_seconds
            self.figures |= {f"prefill_ms_{name}": seconds[0] * 1e3}
            self.figures |= {f"decode_ms_{name}": seconds[1] * 1e3}
            models[name].requires_grad_(False)
            if name != "dense":
                of_dense = prefill["dense"].prefill_seconds, decode["dense"].decode_seconds
                self.figures |= {f"prefill_over_dense_{name}": seconds[0] / of_dense[0]}
                self.figures |= {f"decode_over_dense_{name}": seconds[1] / of_dense[1]}

    def ranked(self, budget: Budget) -> Ranking:
        """The gates ranked by importance, as at the start of every mask-learning run."""
        return SEARCH.choose(self.dense, budget, Fisher(), self.windows_WT)

    def widths(self, budget: Budget, ranking: Ranking) -> Plan:
        """The plan of a ranking for a budget."""
        sites = find_sites(self.dense, budget.family(self.dense.config))
        table = budget.cost.table(self.dense)
        kept = budget.finalise(ranking.positions_N(), sites, table)
        return plan_from_indices(self.dense, "", kept, {})

    def without_blocks(self, blocks: int) -> Plan:
        """The plan without the least influential blocks."""
        windows_WT = self.windows_WT[:16]
        chosen = OneShot(BlockInfluence())(self.dense, windows_WT, Blocks(blocks)).blocks
        gone = [(block, part) for block in chosen for part in PARTS]
        return plan_without(self.dense, "", gone, {})

    def refitted(self, plan: Plan) -> PreTrainedModel:
        """The model cut by a plan, refitted on training text after that of the ranking."""
        narrow = cut(self.dense, plan)
        text_WT: Tensor = self.windows_WT[SEARCH.windows_read(Fisher()) :][:REFIT_WINDOWS]
        refit(self.dense, narrow, plan, text_WT)
        return narrow.eval()


def learn(folder: str, keep: float, recipe: Recipe, root: Path, extra: Sequence[str]) -> float:
    """Run the command line once; return its cost in plain steps."""
    clock = callback(
        f"{PlainSteps.__module__}.{PlainSteps.__name__}",
        model=folder,
        every_n_steps=100,
        batch_size=BATCH_SIZE,
        dtype="bfloat16",
    )
    callbacks = json.dumps([callback("AnnealSparsity"), clock, callback("ExportModel")])
    program = train(
        [
            "fit",
            "--config=configs/disp.yaml",
            f"--trainer.callbacks={callbacks}",
            f"--trainer.default_root_dir={root}",
            f"--trainer.max_steps={recipe.steps}",
            "--trainer.accelerator=cpu",
            "--trainer.limit_val_batches=0",
            "--trainer.enable_progress_bar=false",
            f"--model.base={folder}",
            f"--model.budget.keep={keep}",
            f"--model.learning.start.search={json.dumps(asdict(SEARCH))}",
            f"--data.train={data_folder() / 'text' / 'c4_masktrain.json'}",
            f"--data.validation={data_folder() / 'text' / 'c4_heldout.json'}",
            f"--data.window_tokens={WINDOW_TOKENS}",
            f"--data.batch_size={BATCH_SIZE}",
            "--data.validation_windows=8",
            *recipe.settings,
            *extra,
        ]
    )
    return clock_of(program.trainer).steps


def trained(bench: Bench, what: str, keep: float, root: Path, extra: Sequence[str]) -> None:
    """Run a recipe and measure its export, against the reference if there is one."""
    steps = learn(bench.folder, keep, RECIPES[what], root, extra)
    name = f"{what}_{keep}"
    bench.note(name, bench.load(root / "model"))
    cost = steps / (REFERENCE_STEPS * REFERENCE_STEP)
    bench.figures |= {f"plain_steps_{name}": steps, f"cost_over_reference_{name}": cost}
    if keep == REFERENCE_KEPT:
        reference = statistics.mean(excess(REFERENCE, bench.dense_perplexity).values())
        bench.figures["reference_excess"] = reference
        over = bench.figures[f"excess_{name}"] / reference
        bench.figures[f"{what}_over_reference_{keep}"] = over


def speed(bench: Bench, keeps: Sequence[float], repeats: int) -> None:
    """Time the default budget: masks by importance, cut."""
    ranking = bench.ranked(Budget(min(keeps)))
    plans = {str(keep): bench.widths(Budget(keep), ranking) for keep in keeps}
    bench.speeds({name: cut(bench.dense, plan).eval() for name, plan in plans.items()}, repeats)


def depth(bench: Bench, keeps: Sequence[float], repeats: int) -> None:
    """Depth and widths at equal FLOPs: quality against measured speed, without training."""
    ranking, blocks = bench.ranked(Budget(min(keeps))), bench.dense.config.num_hidden_layers
    models = {}
    for keep in keeps:
        plans = (
            bench.widths(Budget(keep), ranking),
            bench.without_blocks(round((1 - keep) * blocks)),
        )
        for name, plan in zip(("widths", "depth"), plans, strict=True):
            models[f"{name}_{keep}"] = bench.refitted(plan)
    for name, model in models.items():
        bench.note(name, model)
    bench.speeds(models, repeats)


def main() -> None:
    """Measure the requested parts, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Unknown options are passed to train.py."
    )
    parts = [*RECIPES, "speed", "depth"]
    parser.add_argument("--what", nargs="+", choices=parts, default=parts, help="parts to run")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.7], help="kept fractions")
    parser.add_argument("--model", help="model folder (default: SmolLM2-135M, made and kept)")
    parser.add_argument("--items", type=int, default=200, help="questions of a task")
    parser.add_argument("--repeats", type=int, default=7, help="turns of the timing")
    parser.add_argument("--keep-runs", type=Path, help="folder for the runs (default: temporary)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args, extra = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.model or str(smollm2_folder()), args.items)
    with tempfile.TemporaryDirectory() as temporary:
        for what in (part for part in args.what if part in RECIPES):
            for keep in args.kept:
                root = (args.keep_runs or Path(temporary)) / f"{what}_{keep}"
                trained(bench, what, keep, root, extra)
    if "speed" in args.what:
        speed(bench, args.kept, args.repeats)
    if "depth" in args.what:
        depth(bench, args.kept, args.repeats)
    write_figures(bench.figures | {"threads": args.threads}, args.json)


if __name__ == "__main__":
    main()
