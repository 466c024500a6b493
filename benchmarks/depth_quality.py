"""Perplexity after removing 1, 2 and 3 blocks of a small LLaMA, by every score and search.

The opponents are the published programs on the same model, calibration windows and texts: 10
windows of 128 tokens, no protected ends; perplexity of the first 372 windows of c4 and of all 393
of wikitext2. Every model is scored once and every distinct set of blocks measured once. Figures are
added to the file row by row, and rows in it are not measured again, so that a killed run can be
resumed. Compensations read 128 windows of 256 tokens of the mask-training text and are tested on 32
others; `depth_c4_N` is the perplexity of c4 without N blocks by the greedy search, refitted.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.data import (
    data_folder,
    evaluation_windows,
    mask_training_windows,
    write_figures,
)
from secateur.pruning.blocks.compensation import ModelCompensation
from secateur.pruning.blocks.refit import Refit
from secateur.pruning.depth import (
    AngularDistance,
    BlockChoice,
    BlockInfluence,
    BlockMagnitude,
    Blocks,
    Cached,
    Compensation,
    Greedy,
    HalfBlocks,
    OneShot,
    Perplexity,
    ReverseOrder,
    ScaledStream,
    Search,
    Taylor,
    Unit,
    bypassed,
)
from secateur.pruning.depth.search import names
from secateur.pruning.measure.perplexity import perplexity

WINDOWS = {"c4": 372, "wikitext2": 393}
SEARCHES: dict[str, Search] = {
    "perplexity": OneShot(Perplexity()),
    "perplexity, greedy": Greedy(Perplexity()),
    "perplexity, greedy halves": Greedy(Perplexity(), units=HalfBlocks()),
    "block influence": OneShot(BlockInfluence()),
    "block influence, greedy": Greedy(BlockInfluence()),
    "angular, contiguous": OneShot(AngularDistance()),
    "Taylor": OneShot(Taylor()),
    "Taylor, greedy": Greedy(Taylor()),
    "Taylor+": OneShot(Taylor(), protect_first=4, protect_last=2),
    "reverse order": OneShot(ReverseOrder()),
    "magnitude": OneShot(BlockMagnitude()),
}
COMPENSATIONS = {"Refit": Refit(), "ScaledStream": ScaledStream()}
# c4 and wikitext2 after 1, 2 and 3 removals, by the published programs.
REFERENCE = {
    "perplexity": ((120.78, 285.90), (135.82, 302.43), (169.69, 364.21)),
    "perplexity, greedy": ((120.78, 285.90), (135.82, 302.43), (161.96, 351.72)),
    "block influence": ((120.78, 285.90), (143.80, 323.50), (164.56, 343.37)),
    "Taylor": ((130.67, 301.02), (168.71, 379.14), (212.52, 475.34)),
    "magnitude": ((11934.0, 9967.0), (5663.0, 5680.0), (5794.0, 6004.0)),
}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3], help="blocks to remove")
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--compensation", choices=COMPENSATIONS, help="change what remains")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = data_folder() / "models" / "llama7m"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    calibration = np.load(data_folder() / "reference" / "calib_10x128.npy")
    windows_NT = torch.from_numpy(calibration).long()
    texts = {n: evaluation_windows(str(folder))[n][:first] for n, first in WINDOWS.items()}
    measured: dict[frozenset[Unit], list[float]] = {}

    def quality(removed: tuple[Unit, ...]) -> list[float]:
        """Perplexity of the texts without some units."""
        key = frozenset(removed)
        if key not in measured:
            with bypassed(model, removed):
                measured[key] = [perplexity(model, w).value for w in texts.values()]
        return measured[key]

    def compensated(chosen: BlockChoice, how: ModelCompensation) -> dict[str, Any]:
        """The result of a compensation of a choice; perplexity of the texts only if it is kept."""
        shorter = copy.deepcopy(model)
        text_NT = mask_training_windows(str(folder))
        found = Compensation(how, text_NT[:128], text_NT[128:160]).remove(shorter, chosen.removed)
        figures: dict[str, Any] = {"held_back": found.without, "held_back_after": found.compensated}
        if found.kept:
            figures |= {f"after_{n}": perplexity(shorter, w).value for n, w in texts.items()}
        return figures

    known = args.json is not None and args.json.is_file()
    figures: dict[str, Any] = json.loads(args.json.read_text()) if known else {}
    scores = tempfile.TemporaryDirectory()
    for count in args.counts:
        for name in args.searches:
            key = f"{name.replace(', ', '_').replace(' ', '_').lower()}_{count}"
            if args.compensation:
                key += f"_{args.compensation}"
            if f"{key}_{'held_back' if args.compensation else 'c4'}" in figures:
                continue
            search = SEARCHES[name]
            search = replace(search, score=Cached(search.score, scores.name))
            chosen = search(model, windows_NT, Blocks(count))
            row: dict[str, Any] = {"removed": names(chosen.removed)}
            row["calibration"] = chosen.perplexity
            if chosen.better is not None:
                row["better"] = names(chosen.better.removed)
                row["better_calibration"] = chosen.better.perplexity
            if args.compensation:
                row |= compensated(chosen, COMPENSATIONS[args.compensation])
            else:
                row |= dict(zip(texts, quality(chosen.removed), strict=True))
                if name in REFERENCE:
                    row["c4_over_reference"] = row["c4"] / REFERENCE[name][count - 1][0]
            print(f"{name}, {count}: {json.dumps(row)}", flush=True)
            figures |= {f"{key}_{name}": value for name, value in row.items()}
            if (name, args.compensation) == ("perplexity, greedy", "Refit"):
                figures[f"depth_c4_{count}"] = row.get("after_c4")
            if args.json is not None:
                args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    write_figures(figures, args.json)


if __name__ == "__main__":
    main()
