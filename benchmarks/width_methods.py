"""Ways of choosing widths, beside each other: quality with and without the refit, and time.

The 7 M LLaMA in its multi-head form, fp32. Every method ranks the gates on windows of the
mask-training text (8 x 256 tokens at a time), the model is cut to the budget, and measured on the
first 200 windows of three texts: at once, after the closed-form refit on 256 other windows of the
same text, and after steps of distillation that then train all weights on further ones. Excess is
ln(perplexity) - ln(dense perplexity) in nats, the mean of the texts. Times are CPU seconds of this
process over that of a plain step, a forward and backward pass of 8 x 256 tokens through the frozen
model, timed in turns. Methods that draw at random are run once per seed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.data import (
    data_folder,
    evaluation_windows,
    mask_training_windows,
    write_figures,
)
from benchmarks.disp_quality import FIRST_WINDOWS, excess
from benchmarks.disp_step import plain_step
from secateur.modules.rate_schedule import rate_of_settled
from secateur.modules.settling import AllWeights
from secateur.modules.teacher import predicted_tokens, predicting_states
from secateur.pruning.blocks.refit import refit
from secateur.pruning.export.cut import cut
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.losses import LossWeights, head_of, token_losses
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.plan import plan_from_indices
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.evolution import Evolution
from secateur.pruning.widths.exchange import Exchange
from secateur.pruning.widths.feature_statistics import Fluctuation, WandaWidth
from secateur.pruning.widths.gate_gradient import Fisher, GateGradient
from secateur.pruning.widths.gradual_ranking import GradualRanking, WidthSearch
from secateur.pruning.widths.scores import WidthScore
from secateur.pruning.widths.width_magnitude import RandomOrder, WidthMagnitude

REFIT_WINDOWS = 256
ONCE, ROUNDS = GradualRanking(1, 16), GradualRanking(16, 4)
METHODS: dict[str, tuple[WidthScore, WidthSearch]] = {
    "random": (RandomOrder(), ONCE),
    "magnitude": (WidthMagnitude(), ONCE),
    "wanda": (WandaWidth(), ONCE),
    "fluctuation": (Fluctuation(), ONCE),
    "gate_gradient": (GateGradient(), ROUNDS),
    "fisher_once": (Fisher(), ONCE),
    "fisher": (Fisher(), ROUNDS),
    "exchange": (Fisher(), Exchange(ROUNDS)),
    "evolution": (WandaWidth(), Evolution(ONCE)),
    "fisher_evolution": (Fisher(), Evolution(ROUNDS, text_windows=512)),
}


class Bench:
    """A dense model, its texts, and the time of a plain step."""

    def __init__(self, folder: str) -> None:
        self.dense: Any = BaseModel(Path(folder)).load(torch.float32).eval().requires_grad_(False)
        self.texts = evaluation_windows(folder, FIRST_WINDOWS)
        self.windows_WT = mask_training_windows(folder)
        self.perplexity = self.perplexities(self.dense)
        self._step, self.steps = plain_step(folder), [0.0]
        self.steps = [self.plain() for _ in range(4)][1:]

    def perplexities(self, model: Any) -> dict[str, float]:
        """Perplexity of every text."""
        return {name: perplexity(model, own, 20).value for name, own in self.texts.items()}

    def plain(self) -> float:
        """CPU seconds of one plain step."""
        start = time.process_time()
        self._step(self.windows_WT[:8])
        return time.process_time() - start

    def excess(self, model: Any) -> float:
        """Mean excess over the texts, nats."""
        return statistics.mean(excess(self.perplexities(model), self.perplexity).values())

    def measure(
        self, score: WidthScore, search: WidthSearch, keep: float, distil_steps: int
    ) -> dict[str, float]:
        """Figures of one method at one budget."""
        # As in the comparison with the reference, whose budgets are exact.
        budget = Budget(keep, width_multiple=1)
        start = time.process_time()
        read = search.windows_read(score)
        kept = search.choose(self.dense, budget, score, self.windows_WT[:read]).kept(
            find_sites(self.dense, budget.family(self.dense.config))
        )
        ranked = time.process_time() - start
        plan = plan_from_indices(self.dense, "", kept, {})
        narrow = cut(self.dense, plan).eval()
        alone = self.excess(narrow)
        start = time.process_time()
        refit(self.dense, narrow, plan, self.windows_WT[read:][:REFIT_WINDOWS])
        refitted = time.process_time() - start
        self.steps += [self.plain() for _ in range(2)]
        figures = {"excess": alone, "refit_excess": self.excess(narrow)}
        start = time.process_time()
        self.distil(
            narrow, self.windows_WT[read + REFIT_WINDOWS :][: 8 * distil_steps], distil_steps
        )
        trained = time.process_time() - start
        figures["distilled_excess"] = self.excess(narrow)
        step = statistics.median(self.steps)
        return figures | {
            "steps": ranked / step,
            "refit_steps": refitted / step,
            "distilled_steps": trained / step,
        }

    def distil(self, narrow: Any, text_WT: Tensor, steps: int) -> None:
        """Train all weights of a narrow model to predict what the dense one does."""
        train = AllWeights()
        trained = train.of(narrow).trained()
        optimizer = torch.optim.AdamW(trained, lr=train.highest_lr, weight_decay=0.0, fused=True)
        schedule = LambdaLR(optimizer, lambda step: rate_of_settled(step, 0, steps))
        for own_BT in text_WT.chunk(steps):
            with torch.no_grad():
                teacher_ND = predicting_states(self.dense, own_BT)
            losses = token_losses(
                predicting_states(narrow, own_BT),
                predicted_tokens(own_BT),
                head_of(narrow),
                teacher_ND=teacher_ND,
                teacher_head=head_of(self.dense),
                weights=LossWeights(0.0, 1.0),
                parameters=[*narrow.get_output_embeddings().parameters()],
            )
            losses.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def main() -> None:
    """Measure the methods, budget by budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.7, 0.5, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of random methods")
    parser.add_argument("--distil", type=int, default=100, help="steps of distillation")
    parser.add_argument("--model", help="model folder (default: llama7m_mha of the data)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.model or str(data_folder() / "models" / "llama7m_mha"))
    figures: dict[str, Any] = {f"perplexity_{k}_dense": v for k, v in bench.perplexity.items()}
    for keep in args.kept:
        for name in args.methods:
            score, search = METHODS[name]
            variants = [(score, search)]
            if isinstance(score, RandomOrder):
                variants = [(RandomOrder(seed), search) for seed in args.seeds]
            elif isinstance(search, Evolution):
                variants = [(score, replace(search, seed=seed)) for seed in args.seeds]
            found = [bench.measure(*variant, keep, args.distil) for variant in variants]
            for key in found[0]:
                values = [one[key] for one in found]
                figures[f"{name}_{keep}_{key}"] = statistics.mean(values)
                if len(values) > 1:
                    figures[f"{name}_{keep}_{key}_spread"] = max(values) - min(values)
            write_figures(
                figures | {"plain_step_seconds": statistics.median(bench.steps)}, args.json
            )


if __name__ == "__main__":
    main()
