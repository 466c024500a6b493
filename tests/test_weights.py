"""What sparse fine-tuning has to keep, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from secateur.pruning.weights.masks import WeightMasks
from tests.runs import NOISE, call, content, make_inputs, on_text, with_callbacks
from tests.test_resume import finish, kill, prepare

pytestmark = NOISE
WEIGHTS = Path("model", "model.safetensors")
VARIANTS = {
    "2:4, all weights": [
        "--trainer.callbacks.pattern=NM",  # names that the help lists
        "--trainer.callbacks.pattern.n=2",
        "--trainer.callbacks.pattern.m=4",
        "--trainer.callbacks.score=ObsSaliency",
        "--trainer.callbacks.compensation=SparseGPTSweep",
    ],
    "gradually, low rank": [
        "--model.lora.rank=2",
        "--model.lora.dropout=0.5",
        "--trainer.callbacks.pattern=Unstructured",
        "--trainer.callbacks.pattern.sparsity=0.5",
        "--trainer.callbacks.gradually.every_n_steps=2",
        "--trainer.callbacks.gradually.over=0.6",
    ],
}


def prune(
    folder: Path, root: Path, variant: str, subcommand: str = "fit", max_steps: int = 6
) -> list[str]:
    return [
        subcommand,
        "--model=CausalLM",
        f"--model.base={folder / 'base'}",
        "--model.warmup_steps=2",
        *on_text(folder, root),
        f"--trainer.max_steps={max_steps}",
        "--trainer.val_check_interval=3",
        "--trainer.callbacks+=PruneWeights",
        *VARIANTS[variant],
        "--trainer.callbacks.calibration_windows=8",
        "--trainer.callbacks.held_back_windows=4",
        *with_callbacks(["SaveCheckpoint"], every_n_steps=1),
        "--trainer.callbacks.keep=20",
        *with_callbacks(["ExportModel"]),
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    return make_inputs(folder, intermediate_size=36, tie_word_embeddings=True)


@pytest.fixture(scope="module", params=VARIANTS)
def run(
    request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A variant and the output folder of its finished run."""
    root = tmp_path_factory.mktemp("run")
    line = call(prune(inputs, root, request.param))
    assert line.trainer.global_step == 6
    return request.param, root


def check_zeros(root: Path) -> None:
    """Half of every matrix is removed, and an export that somebody loads has every zero."""
    masks, model = WeightMasks.load(root / "weights"), load(root / "model")
    assert type(model) is LlamaForCausalLM
    assert len(masks) == 3 * 7
    for name in masks:
        assert torch.equal(model.get_parameter(name) != 0, masks[name])
        assert (~masks[name]).sum(1).eq(masks[name].shape[1] // 2).all()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_every_zero_is_in_the_exported_model(run: tuple[str, Path], tmp_path: Path) -> None:
    _, root = run
    check_zeros(root)
    load(root / "model").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS.name).read_bytes() == (root / WEIGHTS).read_bytes()
    (stage,) = json.loads((root / "model" / "secateur.json").read_text())["stages"]
    assert stage["provenance"]["weights"]["linear_sparsity"] == 0.5
    assert stage["steps"] == 6
    assert not list((root / "model").glob("*.py"))


def test_every_checkpoint_leads_to_the_same_model(
    run: tuple[str, Path], inputs: Path, tmp_path: Path
) -> None:
    """From before, at and after the rises."""
    variant, root = run
    for step in (1, 2, 3, 5):
        again = tmp_path / str(step)
        checkpoint = root / "checkpoints" / f"step={step}.ckpt"
        call([*prune(inputs, again, variant), f"--ckpt_path={checkpoint}"])
        assert (again / WEIGHTS).read_bytes() == (root / WEIGHTS).read_bytes(), f"from step {step}"


def test_a_checkpoint_is_measured_under_its_masks(run: tuple[str, Path], inputs: Path) -> None:
    variant, root = run
    line = call([*prune(inputs, root, variant, "validate"), "--ckpt_path=last"])
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    measured = report["models"]["pruned"]["perplexity"]["validation"]["value"]
    found = float(line.trainer.callback_metrics["val_perplexity"])
    assert found == pytest.approx(measured, rel=1e-5)


def test_an_export_is_repeated_from_the_last_checkpoint(
    run: tuple[str, Path], inputs: Path
) -> None:
    variant, root = run
    before = (root / WEIGHTS).read_bytes()
    call([*prune(inputs, root, variant), "--ckpt_path=last"])
    assert (root / WEIGHTS).read_bytes() == before


def test_it_survives_a_second_fit(run: tuple[str, Path], inputs: Path) -> None:
    variant, root = run
    before = content(root / "weights")
    with pytest.warns(UserWarning, match="of an earlier run"):
        call(prune(inputs, root, variant))
    assert content(root / "weights") == before
    check_zeros(root)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(inputs: Path, tmp_path: Path) -> None:
    for shared in ("base", "text.json"):
        (tmp_path / shared).symlink_to(inputs / shared)
    variant = "2:4, all weights"
    arguments = [*prune(Path(), Path("run"), variant, max_steps=16), "--ckpt_path=last"]
    arguments.append(f"--data.cache_dir={tmp_path / 'cache'}")
    whole = finish(arguments, prepare(tmp_path, "whole"))
    killed = prepare(tmp_path, "killed")
    root = kill(1, arguments, killed)
    finish(arguments, killed)
    assert content(root / "model") == content(whole / "model")
    check_zeros(root)
