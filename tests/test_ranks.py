"""Two ranks of one machine, on the CPU with gloo, through both phases of learning masks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pruning.plan import PruningPlan
from tests.runs import learn_masks, make_inputs

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_ranks_learn_settle_and_export(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    arguments = [
        *learn_masks(tmp_path, tmp_path / "run", 6),
        "--trainer.devices=2",
        "--trainer.strategy=ddp_find_unused_parameters_true",  # as the recipes for several GPUs
    ]
    run = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    plan = PruningPlan.load(tmp_path / "run" / "plan")
    assert plan.provenance["step"] == 6
    assert plan.gains is not None  # both phases ran
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
