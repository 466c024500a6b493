"""What narrowing while training has to keep, through the command line."""

from __future__ import annotations

from pathlib import Path

from tests.runs import NOISE, call, content, make_inputs, prune_weights

pytestmark = NOISE
WIDTHS = [
    "--trainer.callbacks+=PruneWidths",
    "--trainer.callbacks.budget.keep=0.6",
    "--trainer.callbacks.search.start.rounds=2",
    "--trainer.callbacks.search.start.batches_per_round=1",
    "--trainer.callbacks.search.start.batch_size=4",
    "--trainer.callbacks.search.rounds=2",
    "--trainer.callbacks.search.batches_per_round=1",
    "--trainer.callbacks.gradually.every_n_steps=2",
    "--trainer.callbacks.gradually.over=0.6",
    "--trainer.callbacks.calibration_windows=40",
    "--trainer.callbacks.held_back_windows=8",
]


def test_widths_are_refitted_and_a_resumed_run_ends_as_the_whole_one(tmp_path: Path) -> None:
    """The product of the fractions of its two cuts is above the budget, by rounding."""
    inputs = make_inputs(tmp_path)
    call(prune_weights(inputs, tmp_path / "whole", WIDTHS))
    dense, narrow = (tmp_path / "base", tmp_path / "whole" / "model")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (dense, narrow)]
    assert sizes[1] < sizes[0]
    checkpoint = tmp_path / "whole" / "checkpoints" / "step=3.ckpt"
    again = prune_weights(inputs, tmp_path / "again", WIDTHS)
    call([*again, f"--ckpt_path={checkpoint}"])
    both = [content(tmp_path / run / "model")["model.safetensors"] for run in ("whole", "again")]
    assert both[0] == both[1]
