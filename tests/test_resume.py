"""A run that is killed at any step and resumed ends byte for byte as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from benchmarks.kill_resume import PHASES, measure, measure_exports, measure_variants
from secateur.modules import MaskLearning
from secateur.pruning.files.checkpoints import read_figures
from tests.runs import (
    NOISE,
    call,
    content,
    learn_masks,
    make_inputs,
    on_text,
    with_callbacks,
    write_text,
)

pytestmark = NOISE
REPOSITORY = Path(__file__).parents[1]


def command(folder: Path, max_steps: int, *settings: str) -> list[str]:
    """Relative paths, run in a folder of its own: equal commands, which model cards show."""
    return [
        *learn_masks(Path(), Path("run"), max_steps),
        *settings,
        f"--data.cache_dir={folder / 'cache'}",
        "--ckpt_path=last",
    ]


def prepare(folder: Path, name: str) -> Path:
    """A folder beside the inputs, which sees them under the same relative paths."""
    folder = folder / name
    folder.mkdir(exist_ok=True)
    for shared in ("base", "text.json"):
        if not (folder / shared).exists():
            (folder / shared).symlink_to(Path("..") / shared)
    return folder


def finish(arguments: list[str], folder: Path) -> Path:
    """Run to the end in this process; returns the output folder."""
    with chdir(folder):
        call(arguments)
    return folder / "run"


def kill(seed: int, arguments: list[str], folder: Path) -> Path:
    """SIGKILL a moment after a checkpoint, both chosen by the seed; returns the output folder."""
    draw = random.Random(seed)
    first, moment = draw.choice([3, 6, 9]), draw.uniform(0, 0.03)
    root, log, deadline = folder / "run", folder / "log.txt", time.monotonic() + 120
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "train.py"), *arguments],
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        while not (root / "checkpoints" / f"step={first}.ckpt").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moment)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (root / "model").exists()  # it was under way
    return root


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_killed_runs_end_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """Within a step, while a checkpoint is written, and while the model is exported."""
    figures = measure(tmp_path, kills=3, max_steps=6)
    assert figures["different_plans"] == figures["different_models"] == 0
    # A moment drawn for one phase may fall into the next where the machine is slower or faster.
    assert sum(figures[f"killed_in_{phase}"] for phase in PHASES) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_killed_runs_of_other_kinds_end_as_uninterrupted_ones(tmp_path: Path) -> None:
    """Two of the variants, and an export at three places; the benchmark has them all."""
    names = ["masks of a narrow base, settled", "zeros gradually, low rank"]
    figures = measure_variants(tmp_path, names)
    assert figures["different"] == []
    assert figures["different_plans"] == figures["different_models"] == 0
    figures = measure_exports(tmp_path, kills=3)
    assert figures["writes"] > 10
    assert figures["different_exports"] == 0


def test_a_run_that_is_asked_to_stop_while_it_exports_goes_on_with_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_inputs(tmp_path)
    run = [*learn_masks(tmp_path, tmp_path / "run", 3), "--ckpt_path=last"]
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(MaskLearning, "export", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            call(run)
    assert stop.value.code == 75
    resumed = call(run)
    assert resumed.trainer.fit_loop.epoch_loop.batch_progress.current.ready == 3  # none was added
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("scheduler", [True, False], ids=["srun", "a person"])
def test_sigterm_while_libraries_load_waits_for_the_first_step_under_srun_only(
    scheduler: bool, tmp_path: Path
) -> None:
    """Sent before the first import has ended: by a scheduler it is a preemption."""
    make_inputs(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Sender:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'lightning':\n"
        "            sys.meta_path.remove(self)\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Sender())\n"
    )
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PATH": str(tmp_path)}
    environment |= {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"} if scheduler else {}
    environment |= {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"} if scheduler else {}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *learn_masks(tmp_path, tmp_path / "run", 9)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == (75 if scheduler else -signal.SIGTERM), done.stderr
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").glob("*")}
    assert saved == ({"step=1.ckpt"} if scheduler else set())


def test_every_checkpoint_leads_to_the_same_plan(tmp_path: Path) -> None:
    """From within an epoch and from its end, and from validations, in one process."""
    make_inputs(tmp_path)
    write_text(tmp_path / "text.json", documents=5)
    settings = ["--trainer.val_check_interval=3", "--trainer.logger=false"]
    callbacks = ("AnnealSparsity", "TrackBudget", "ExportModel")
    run = [*learn_masks(tmp_path, tmp_path / "run", 8, callbacks), *settings]
    call([*run, *with_callbacks(["SaveCheckpoint"], every_n_steps=1), "--trainer.callbacks.keep=9"])
    whole = content(tmp_path / "run" / "plan")
    for step in (2, 3, 5, 7):
        root = tmp_path / f"from_{step}"
        path = tmp_path / "run" / "checkpoints" / f"step={step}.ckpt"
        resumed = call([*run, f"--trainer.default_root_dir={root}", f"--ckpt_path={path}"])
        assert resumed.trainer.global_step == 8
        assert content(root / "plan") == whole, f"from step {step}"
    root = tmp_path / "best"  # written at the end of a validation, in which the loops stand
    run += [f"--trainer.default_root_dir={root}", *with_callbacks(["SaveCheckpoint"])]
    run += ["--trainer.callbacks.every_n_steps=50", "--trainer.callbacks.keep_best=9"]
    call(run)
    figures = read_figures(root / "checkpoints")
    assert set(figures) == {"step=3.ckpt", "step=6.ckpt"}
    for path in ("best", root / "checkpoints" / max(figures, key=figures.__getitem__)):
        assert call([*run, f"--ckpt_path={path}"]).trainer.global_step == 8
        assert content(root / "plan") == whole, f"from {path}"


@pytest.mark.parametrize(("batch_size", "batches"), [(16, 1), (4, 4)])
def test_steps_go_on_in_other_batches(batch_size: int, batches: int, tmp_path: Path) -> None:
    """From two batches a step to one and to four, with the clipping that was set."""
    make_inputs(tmp_path)
    run = [
        "fit",
        "--model=CausalLM",
        f"--model.base={tmp_path / 'base'}",
        *on_text(tmp_path, tmp_path / "run"),
        *with_callbacks(["SaveCheckpoint"], every_n_steps=1),
        *("--trainer.callbacks.keep=9", "--trainer.max_steps=5", "--trainer.logger=false"),
        *("--trainer.gradient_clip_val=0.1", "--trainer.gradient_clip_algorithm=norm"),
        "--trainer.limit_val_batches=0",
    ]
    whole = call([*run, "--data.batch_size=8", "--trainer.accumulate_grad_batches=2"])
    settings = [f"--data.batch_size={batch_size}", f"--trainer.accumulate_grad_batches={batches}"]
    path = tmp_path / "run" / "checkpoints" / "step=3.ckpt"
    resumed = call([*run, *settings, f"--ckpt_path={path}"])
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=0)


def test_two_exports_of_one_checkpoint_are_equal(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    run = learn_masks(tmp_path, tmp_path / "run", 3)
    call(run)
    again = [*run, "--ckpt_path=last"]
    call(again)
    first = content(tmp_path / "run" / "model")
    call(again)
    assert content(tmp_path / "run" / "model") == first
    assert {
        "README.md",
        "model.safetensors",
        "config.json",
        "plan/plan.safetensors",
    } <= first.keys()


def test_a_checkpoint_holds_no_model_and_runs_no_code(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    call(learn_masks(tmp_path, tmp_path / "run", 3))
    path = tmp_path / "run" / "checkpoints" / "step=3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert any(name.startswith("hypernetwork.") for name in checkpoint["state_dict"])
    assert not any(name.startswith("model.") for name in checkpoint["state_dict"])
    assert checkpoint["secateur"]["budget"].startswith("Budget(keep=0.5")
    assert checkpoint["global_step"] == 3


@pytest.mark.slow
def test_a_killed_run_on_stories260k_ends_as_an_uninterrupted_one(
    tmp_path: Path, data: Path
) -> None:
    (tmp_path / "base").symlink_to(data / "models" / "stories260K")
    (tmp_path / "text.json").symlink_to(write_text(tmp_path / "stories.json"))
    arguments = command(tmp_path, 16, "--data.window_tokens=64")
    whole = finish(arguments, prepare(tmp_path, "whole"))
    killed = prepare(tmp_path, "killed")
    root = kill(1, arguments, killed)
    finish(arguments, killed)
    assert content(root / "plan") == content(whole / "plan")
    assert content(root / "model") == content(whole / "model")
