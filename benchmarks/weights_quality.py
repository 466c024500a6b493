"""Perplexity of the 7 M LLaMA after one-shot weight pruning, beside the reference programs.

Calibrated on the first 128 windows of the mask-training text (256 tokens, fp32); measured on c4
(first 372 windows), wikitext2 (all 393) and tinystories (first 212). Run it in pieces: figures are
merged into the file of `--json`, and figures in it are not measured again.

The figure of merit is `best_over_sparsegpt_<point>`: the mean over the texts of ln(perplexity) of
the best combination minus that of SparseGPT alone, in nats; below 0 on every text is better.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.data import data_folder, evaluation_windows, write_figures
from secateur.pruning.blocks.source import LiveBlocks
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.weights.alpha_pruning import AlphaPruning
from secateur.pruning.weights.barber import Barber
from secateur.pruning.weights.dass import DaSS
from secateur.pruning.weights.dsnot import DSnoT
from secateur.pruning.weights.joint_saliency import JointSaliency
from secateur.pruning.weights.layers import MlpOnly
from secateur.pruning.weights.least_squares import LeastSquares, ResidualLeastSquares
from secateur.pruning.weights.loop import prune_weights
from secateur.pruning.weights.magnitude import Magnitude
from secateur.pruning.weights.pattern import NM, Pattern, Unstructured
from secateur.pruning.weights.recipe import WeightRecipe
from secateur.pruning.weights.sparse_gpt import ObsSaliency, SparseGPTSweep
from secateur.pruning.weights.wanda import Wanda

POINTS: dict[str, Pattern] = {
    "50%": Unstructured(0.5),
    "4:8": NM(4, 8),
    "2:4": NM(2, 4),
    "70%": Unstructured(0.7),
}
WINDOWS = {"c4": 372, "wikitext2": 393, "tinystories": 212}
# Perplexities of the reference programs (c4, wikitext2, tinystories) under the same protocol.
REFERENCE = {
    ("wanda", "50%"): (114.74, 264.72, 42.04),
    ("wanda", "2:4"): (124.97, 285.14, 45.98),
    ("wanda", "4:8"): (120.04, 267.46, 44.61),
    ("sparsegpt", "50%"): (111.28, 262.47, 40.18),
    ("sparsegpt", "2:4"): (114.57, 270.26, 43.96),
    ("sparsegpt", "4:8"): (112.80, 264.78, 42.60),
    ("magnitude", "50%"): (117.30, 272.57, 39.95),
    ("magnitude", "2:4"): (130.61, 286.11, 44.97),
    ("magnitude", "4:8"): (123.62, 271.38, 42.33),
    ("dass", "50%"): (113.94, 268.72, 41.05),
    ("dass", "2:4"): (121.69, 277.71, 43.89),
    ("dass", "4:8"): (117.66, 273.38, 42.69),
}


def combinations(pattern: Pattern) -> dict[str, WeightRecipe]:
    """Name to recipe, for one pattern, without incompatible combinations."""
    magnitude, wanda = WeightRecipe(pattern, Magnitude()), WeightRecipe(pattern, Wanda())
    dass = WeightRecipe(pattern, DaSS(), matrices=MlpOnly())
    sparsegpt = WeightRecipe(pattern, ObsSaliency(), compensation=SparseGPTSweep())
    found = {"sparsegpt": sparsegpt, "magnitude": magnitude, "wanda": wanda, "dass": dass}
    for name, base in [*found.items()]:
        for suffix, change in (
            ("least_squares", {"compensation": LeastSquares()}),
            ("residual", {"compensation": ResidualLeastSquares()}),
            ("sweep", {"compensation": SparseGPTSweep()}),
            ("barber", {"refinement": Barber()}),
            ("barber+least_squares", {"refinement": Barber(), "compensation": LeastSquares()}),
            ("dsnot", {"refinement": DSnoT()}),
            ("dsnot+least_squares", {"refinement": DSnoT(), "compensation": LeastSquares()}),
            ("alpha", {"allocation": AlphaPruning()}),
        ):
            if (name, suffix) == ("sparsegpt", "sweep") or ("dass" in name and "dsnot" in suffix):
                continue
            if suffix == "alpha" and not isinstance(pattern, Unstructured):
                continue
            found[f"{name}+{suffix}"] = replace(base, **change)
    if isinstance(pattern, NM):
        joint = WeightRecipe(pattern, JointSaliency(), compensation=SparseGPTSweep())
        found["joint+sweep"] = joint
        found["joint+least_squares"] = replace(joint, compensation=LeastSquares())
    return found


def main() -> None:
    """Prune, measure, merge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", nargs="+", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--combinations", nargs="+", help="names (default: all)")
    parser.add_argument("--list", action="store_true", help="print the combinations and stop")
    parser.add_argument("--table", action="store_true", help="print the file as a table and stop")
    parser.add_argument("--model", help="model folder (default: llama7m of the data)")
    parser.add_argument("--windows", type=int, help="windows per text (default: the protocol's)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="merge the figures into this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    known = combinations(Unstructured(0.5)) | combinations(NM(2, 4))
    if args.list:
        print("\n".join(known))
        return
    names = args.combinations or list(known)
    if strange := sorted(set(names) - set(known)):
        parser.error(f"unknown combinations {', '.join(strange)}; --list prints all.")

    folder = args.model or str(data_folder() / "models" / "llama7m")
    calibration_NT = torch.from_numpy(
        np.load(data_folder() / "reference" / "calib_128x256.npy").astype(np.int64)
    )
    texts = {
        name: windows[: args.windows or WINDOWS[name]]
        for name, windows in evaluation_windows(folder).items()
    }
    figures: dict[str, Any] = {}
    if args.json is not None and args.json.is_file():
        figures = json.loads(args.json.read_text(encoding="utf-8"))

    if args.table:
        print(table(figures))
        return
    protocol = {"model": Path(folder).name, "windows_per_text": args.windows or "protocol"}
    if figures and {key: figures.get(key) for key in protocol} != protocol:
        parser.error(f"{args.json} was measured with other settings; give another file.")
    figures |= protocol

    def measured(name: str, prune: Callable[[Any], None]) -> None:
        if f"{name}_{list(texts)[-1]}" in figures:
            return
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        start = time.perf_counter()
        prune(model)
        figures[f"{name}_seconds"] = time.perf_counter() - start
        for text, windows_NT in texts.items():
            figures[f"{name}_{text}"] = perplexity(model, windows_NT, 4).value
        write_figures(figures | summary(figures, list(texts)), args.json)

    measured("dense", lambda model: None)
    for point in args.points:
        recipes = combinations(POINTS[point])
        for name in names:
            if name in recipes:
                measured(
                    f"{name}_{point}",
                    lambda model, recipe=recipes[name]: pruned(model, recipe, calibration_NT),
                )
    write_figures(figures | summary(figures, list(texts)), args.json)


def pruned(model: Any, recipe: WeightRecipe, calibration_NT: Tensor) -> None:
    """Prune a live model with every part applied, whether it helps or not."""
    prune_weights(LiveBlocks(model), recipe, calibration_NT)


def summary(figures: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """The best combination of every point against SparseGPT alone, and ours over the reference."""
    found: dict[str, Any] = {}
    for point in POINTS:
        logs = {
            name: [math.log(figures[f"{name}_{point}_{text}"]) for text in texts]
            for name in combinations(POINTS[point])
            if f"{name}_{point}_{texts[-1]}" in figures
        }
        for name, values in logs.items():
            reference = REFERENCE.get((name, point))
            if reference and figures["windows_per_text"] == "protocol":
                off = [own - math.log(other) for own, other in zip(values, reference, strict=True)]
                found[f"reference_{name}_{point}_worst_nats"] = max(off, key=abs)
        opponent = logs.pop("sparsegpt", None)
        if opponent and logs:
            best = min(logs, key=lambda name: sum(logs[name]))
            gains = [own - other for own, other in zip(logs[best], opponent, strict=True)]
            found[f"best_{point}"] = best
            found[f"best_over_sparsegpt_{point}"] = sum(gains) / len(gains)
            found[f"best_over_sparsegpt_{point}_worst_text"] = max(gains)
    return found


def table(figures: dict[str, Any]) -> str:
    """The measured figures as a Markdown table, with those of the reference in brackets."""
    points = list(POINTS)
    lines = [f"| | {' | '.join(points)} |", f"|---|{'---|' * len(points)}"]
    for name in combinations(Unstructured(0.5)) | combinations(NM(2, 4)):
        cells = []
        for point in points:
            values = [figures.get(f"{name}_{point}_{text}") for text in WINDOWS]
            cell = "" if None in values else " / ".join(f"{value:.2f}" for value in values)
            if cell and (name, point) in REFERENCE:
                known = " / ".join(f"{value:.2f}" for value in REFERENCE[name, point])
                cell = f"{cell} ({known})"
            cells.append(cell)
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
