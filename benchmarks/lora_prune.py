"""Widths that go while low-rank updates train, beside those cut at once: scores of LoRAPrune.

The 7 M LLaMA, fp32, LoRA of rank 8 on all seven projections, cross-entropy, steps of 8 x 256 tokens
of the mask-training text. MLP channels alone are cut, equally many in every block (`uniform`). The
gradual methods close gates every 10 steps between 10 % and 90 % of the steps; `at_once` ranks by
the same gradient on calibration windows, cuts, and trains for as many steps; `magnitude` as well.
No method refits. Excess is ln(perplexity) - ln(dense perplexity) in nats, the mean of the first 200
windows of three texts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from benchmarks.data import data_folder, evaluation_windows, write_figures
from benchmarks.disp_quality import FIRST_WINDOWS, excess
from secateur.callbacks import PruneWidths
from secateur.modules import CausalLM, TextData
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.lora import LoRA
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.weights.gradually import Gradually
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gate_gradient import GateGradient
from secateur.pruning.widths.gate_taylor import GateTaylor
from secateur.pruning.widths.gradual_ranking import GradualRanking
from secateur.pruning.widths.lora_taylor import LoRATaylor
from secateur.pruning.widths.width_magnitude import WidthMagnitude

GRADUALLY = Gradually(10, over=0.9, after=0.1)
METHODS: dict[str, dict[str, Any]] = {
    "gate_taylor": {"score": GateTaylor(), "gradually": GRADUALLY},
    "lora_taylor": {"score": LoRATaylor(), "gradually": GRADUALLY},
    "at_once": {"score": GateGradient(), "search": GradualRanking(1, 16)},
    "magnitude": {"score": WidthMagnitude(), "search": GradualRanking(1, 1)},
}


RATE = 1e-3


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)


def measure(model: str, method: str, keep: float, steps: int, seed: int) -> tuple[Any, float]:
    """Train and prune; return the model as it would be exported, and the seconds."""
    seed_everything(seed, verbose=False)
    settings = {"compensation": None, "held_back_windows": 16} | METHODS[method]
    module = CausalLM(base=model, lora=LoRA(), optimizer=_adamw, warmup_steps=steps // 10)
    text = TextData(
        str(data_folder() / "text" / "c4_masktrain.json"),
        tokenizer=model,
        window_tokens=256,
        batch_size=8,
        seed=seed,
    )
    start = time.process_time()
    with tempfile.TemporaryDirectory() as root:
        Trainer(
            default_root_dir=root,
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            callbacks=[PruneWidths(Budget(keep, uniform=True), **settings)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
        ).fit(module, text)
    return module, time.process_time() - start


def main() -> None:
    """Measure the methods one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kept", type=float, default=0.5, help="fraction of the block FLOPs")
    parser.add_argument("--steps", type=int, default=200, help="steps of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = str(data_folder() / "models" / "llama7m")
    texts = evaluation_windows(model, FIRST_WINDOWS)
    dense: Any = BaseModel(Path(model)).load(torch.float32).eval()

    def perplexities(of: Any) -> dict[str, float]:
        return {name: perplexity(of, windows, 20).value for name, windows in texts.items()}

    dense_is = perplexities(dense)
    figures: dict[str, Any] = {f"perplexity_{name}_dense": v for name, v in dense_is.items()}
    for method in args.methods:
        found, seconds = [], []
        for seed in args.seeds:
            module, spent = measure(model, method, args.kept, args.steps, seed)
            with module.plain() as made:
                found.append(statistics.mean(excess(perplexities(made), dense_is).values()))
            seconds.append(spent)
        figures[f"{method}_{args.kept}_excess"] = statistics.mean(found)
        figures[f"{method}_{args.kept}_seconds"] = statistics.mean(seconds)
        opponent = figures.get(f"gate_taylor_{args.kept}_excess")
        if opponent is not None:
            figures[f"{method}_{args.kept}_over_gate_taylor"] = statistics.mean(found) / opponent
        write_figures(figures, args.json)


if __name__ == "__main__":
    main()
