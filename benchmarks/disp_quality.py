"""Quality of learned masks against the reference implementation of DISP-LLM, at equal steps.

Runs `python train.py fit` with the recipe of configs/disp.yaml on the mask-training text (batch 8 x
256 tokens, fp32), loads the exported folder, and measures perplexity on the first 200 windows of
three texts. Excess is ln(perplexity) - ln(dense perplexity) in nats; the figure of merit is the
mean excess over the three texts divided by that of the reference's released code after 1000 steps,
measured on the same model, texts and windows. The budget is counted on the exported model.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.data import data_folder, evaluation_windows, write_figures
from secateur.program import train
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.measure.report import count

FIRST_WINDOWS = 200
# Perplexities of the reference after 1000 steps (c4, wikitext2, tinystories), by kept fraction.
REFERENCE = {
    0.5: (125.8, 284.0, 56.3),
    0.3: (160.4, 349.5, 82.4),
    0.8: (108.0, 251.2, 43.0),
}


def excess(of: dict[str, float], dense: dict[str, float]) -> dict[str, float]:
    """Nats over the dense model, text by text."""
    return {name: math.log(of[name]) - math.log(dense[name]) for name in dense}


def perplexities(folder: Path | str, tokenizer: str) -> tuple[dict[str, float], int]:
    """Perplexity of every text, and the parameters of the block projections."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    texts = evaluation_windows(tokenizer, FIRST_WINDOWS)
    values = {name: perplexity(model, windows, 20).value for name, windows in texts.items()}
    return values, count(model).block_projection_parameters


def learn(model: str, keep: float, steps: int, seed: int, root: Path, extra: list[str]) -> None:
    """One run of the command line."""
    train(
        [
            "fit",
            "--config=configs/disp.yaml",
            f"--seed_everything={seed}",
            f"--trainer.default_root_dir={root}",
            f"--trainer.max_steps={steps}",
            "--trainer.accelerator=cpu",
            "--trainer.limit_val_batches=0",
            "--trainer.enable_progress_bar=false",
            f"--model.base={model}",
            f"--model.budget.keep={keep}",
            f"--model.sampler.seed={seed}",
            f"--model.hypernetwork.seed={seed}",
            f"--data.train={data_folder() / 'text' / 'c4_masktrain.json'}",
            f"--data.validation={data_folder() / 'text' / 'c4_heldout.json'}",
            "--data.window_tokens=256",
            "--data.batch_size=8",
            "--data.validation_windows=8",
            *extra,
        ]
    )


def main() -> None:
    """Learn, export and measure, seed by seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Options that are not known go to train.py."
    )
    parser.add_argument("--kept", type=float, default=0.5, help="kept fraction, 0.3, 0.5 or 0.8")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed")
    parser.add_argument("--model", help="model folder (default: llama7m_mha of the data)")
    parser.add_argument("--keep-runs", type=Path, help="folder for the runs (default: temporary)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args, extra = parser.parse_known_args()
    if args.kept not in REFERENCE:
        parser.error(f"--kept must be one of {sorted(REFERENCE)}: the reference has no other.")
    torch.set_num_threads(args.threads)
    model = args.model or str(data_folder() / "models" / "llama7m_mha")
    dense, dense_parameters = perplexities(model, model)
    reference = excess(dict(zip(dense, REFERENCE[args.kept], strict=True)), dense)

    figures: dict[str, Any] = {"kept_asked": args.kept, "steps": args.steps}
    ratios, texts_lower = [], True
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            root = (args.keep_runs or Path(temporary)) / f"kept{args.kept}_seed{seed}"
            start = time.perf_counter()
            learn(model, args.kept, args.steps, seed, root, extra)
            seconds = time.perf_counter() - start
            found, parameters = perplexities(root / "model", model)
        over = excess(found, dense)
        ratio = statistics.mean(over.values()) / statistics.mean(reference.values())
        ratios.append(ratio)
        texts_lower &= all(over[name] < reference[name] for name in over)
        figures |= {f"perplexity_{name}_seed{seed}": value for name, value in found.items()}
        figures |= {
            f"mean_excess_seed{seed}": statistics.mean(over.values()),
            f"excess_over_reference_seed{seed}": ratio,
            f"kept_counted_seed{seed}": parameters / dense_parameters,
            f"seconds_seed{seed}": seconds,
        }
    figures |= {
        "excess_over_reference": statistics.mean(ratios),
        "excess_over_reference_worst": max(ratios),
        "lower_on_every_text": texts_lower,
        "reference_mean_excess": statistics.mean(reference.values()),
        "kept_off_target": max(
            abs(value / args.kept - 1)
            for name, value in figures.items()
            if name.startswith("kept_counted")
        ),
        "threads": args.threads,
    }
    write_figures(figures, args.json)


if __name__ == "__main__":
    main()
