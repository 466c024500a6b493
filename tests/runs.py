"""Runs of the command line on tiny models: what a user would type, in a folder of its own."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from secateur.command_line import TrainCLI
from secateur.program import train
from tests.tiny import SENTENCES, tiny_folder

# Of Lightning's own code: what its command line uses of jsonargparse, what it uses of torch.
NOISE = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]
CALLBACKS = ("AnnealSparsity", "TrackBudget", "PlotWidths", "SaveCheckpoint", "ExportModel")

# A ranking, a refit and a guard on as little text as these tests have.
QUICK = (
    "--model.learning.start.search.start.rounds=2",
    "--model.learning.start.search.start.batches_per_round=1",
    "--model.learning.start.search.start.batch_size=4",
    "--model.learning.start.search.rounds=2",
    "--model.learning.start.search.batches_per_round=1",
    "--model.settle.refit_windows=40",
    "--model.settle.held_back_windows=8",
)


def call(arguments: Sequence[str]) -> TrainCLI:
    """Run the command line in this process, as if `arguments` had been typed."""
    with patch.object(sys, "argv", ["train.py", *arguments]):
        return train()


def write_text(path: Path, documents: int = 60, seed: int = 0) -> Path:
    """Documents of 40 words each, about 99 tokens of the tiny tokenizer; always the same."""
    draw, words = random.Random(seed), " ".join(SENTENCES).split()
    texts = [" ".join(draw.choices(words, k=40)) for _ in range(documents)]
    path.write_text(json.dumps(texts), encoding="utf-8")
    return path


def make_inputs(folder: Path, **overrides: Any) -> Path:
    """A folder with a tiny model `base` and a text `text.json`."""
    tiny_folder(folder / "base", **overrides)
    write_text(folder / "text.json")
    return folder


def on_text(folder: Path, root: Path) -> list[str]:
    """Arguments of data and trainer that every run of these tests shares."""
    return [
        "--data=TextData",
        f"--data.train={folder / 'text.json'}",
        "--data.window_tokens=16",
        "--data.batch_size=4",
        "--data.validation_windows=6",
        f"--data.cache_dir={folder / 'cache'}",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={root}",
        "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=1",
    ]


def with_callbacks(names: Sequence[str] = CALLBACKS, every_n_steps: int = 3) -> list[str]:
    """Arguments that add callbacks of ours."""
    arguments = []
    for name in names:
        arguments.append(f"--trainer.callbacks+={name}")
        if name in ("SaveCheckpoint", "TrackBudget"):
            arguments.append(f"--trainer.callbacks.every_n_steps={every_n_steps}")
        if name == "TrackBudget":  # so few steps reach no budget, which it would say
            arguments.append("--trainer.callbacks.tolerance=1")
    return arguments


def learn_masks(
    folder: Path,
    root: Path,
    max_steps: int = 8,
    callbacks: Sequence[str] = CALLBACKS,
    every_n_steps: int = 3,
) -> list[str]:
    """Arguments of a whole run that learns masks."""
    return [
        "fit",
        "--model=MaskLearning",
        f"--model.base={folder / 'base'}",
        *on_text(folder, root),
        *QUICK,
        f"--trainer.max_steps={max_steps}",
        *with_callbacks(callbacks, every_n_steps),
    ]


def from_open_gates(run: list[str]) -> list[str]:
    """The same without what needs the model whole: a ranking, and cutting."""
    whole = [argument for argument in run if not argument.startswith("--model.learning.start")]
    return [*whole, "--model.learning.start=null", "--model.settle.cut=false"]


def prune_weights(
    folder: Path,
    root: Path,
    callback: Sequence[str],
    subcommand: str = "fit",
    max_steps: int = 6,
    val_check_interval: int = 2,
) -> list[str]:
    """Arguments of a whole run that trains weights, with a checkpoint at every step.

    Args:
        folder: The folder that `make_inputs` filled.
        root: Where outputs go.
        callback: Adds the callback that prunes, and sets what the run does beside.
        subcommand: Of `train.py`.
        max_steps: Optimiser steps.
        val_check_interval: Steps from one validation to the next.
    """
    return [
        subcommand,
        "--model=CausalLM",
        f"--model.base={folder / 'base'}",
        "--model.warmup_steps=2",
        *on_text(folder, root),
        f"--trainer.max_steps={max_steps}",
        f"--trainer.val_check_interval={val_check_interval}",
        *callback,
        *with_callbacks(["SaveCheckpoint"], every_n_steps=1),
        "--trainer.callbacks.keep=20",
        *with_callbacks(["ExportModel"]),
    ]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
