"""What removing blocks while training has to keep, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from secateur.pruning.depth import Perplexity, Unit, bypassed
from tests.runs import NOISE, call, content, make_inputs, on_text, prune_weights

pytestmark = NOISE
REPOSITORY = Path(__file__).parents[1]
WEIGHTS, CONFIG = Path("model", "model.safetensors"), Path("model", "config.json")
VARIANTS = {
    "all weights": ["--model.loss.cross_entropy=0", "--model.loss.distillation=1"],
    "refitted": [],
    "low rank": ["--model.lora.rank=2", "--model.lora.dropout=0.5"],
}


BLOCKS = [
    "--trainer.callbacks.target=Blocks",
    "--trainer.callbacks.target.count=2",
]
HALVES = [
    "--trainer.callbacks.target=Blocks",
    "--trainer.callbacks.target.count=1",
    "--trainer.callbacks.search=OneShot",
    "--trainer.callbacks.search.score=BlockMagnitude",  # names two attentions
    "--trainer.callbacks.search.units=HalfBlocks",
]


def prune(
    folder: Path, root: Path, variant: str, subcommand: str = "fit", search: Sequence[str] = BLOCKS
) -> list[str]:
    """Two blocks of four, or two halves, go before steps 1 and 4 of 6."""
    callback = [
        *VARIANTS[variant],
        "--trainer.callbacks+=PruneBlocks",
        *search,
        "--trainer.callbacks.removals=OneByOne",
        "--trainer.callbacks.removals.every_n_steps=3",
        "--trainer.callbacks.removals.first_step=1",
        "--trainer.callbacks.calibration_windows=24",
        *(["--trainer.callbacks.compensation=Refit"] if variant == "refitted" else []),
    ]
    return prune_weights(folder, root, callback, subcommand)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    return make_inputs(folder, num_hidden_layers=4, tie_word_embeddings=True)


@pytest.fixture(scope="module", params=VARIANTS)
def run(
    request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A variant and the output folder of its finished run."""
    root = tmp_path_factory.mktemp("run")
    line = call(prune(inputs, root, request.param))
    assert line.trainer.global_step == 6
    return request.param, root


def test_it_leaves_a_stock_model_with_as_many_blocks_as_asked_for(
    run: tuple[str, Path], inputs: Path
) -> None:
    _, root = run
    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(f) for f in (inputs / "base", root / "model")
    )
    assert type(pruned) is LlamaForCausalLM
    one_block = sum(p.numel() for p in dense.model.layers[0].parameters())
    assert pruned.num_parameters() == dense.num_parameters() - 2 * one_block
    assert not list((root / "model").glob("*.py"))
    (stage,) = json.loads((root / "model" / "secateur.json").read_text())["stages"]
    removals = stage["provenance"]["depth"]["removals"]
    assert [removal["provenance"]["step"] for removal in removals] == [1, 4]
    gone = [int(unit) for removal in removals for unit in removal["units"]]
    assert sorted(gone + stage["provenance"]["depth"]["kept_blocks"]) == [0, 1, 2, 3]


def test_every_checkpoint_leads_to_the_same_model(
    run: tuple[str, Path], inputs: Path, tmp_path: Path
) -> None:
    """From before, between and after the removals; in folders where nothing has been scored."""
    variant, root = run
    for step in (1, 3, 4, 5):
        again = tmp_path / str(step)
        checkpoint = root / "checkpoints" / f"step={step}.ckpt"
        line = call([*prune(inputs, again, variant), f"--ckpt_path={checkpoint}"])
        assert line.trainer.global_step == 6
        for file in (WEIGHTS, CONFIG):
            assert (again / file).read_bytes() == (root / file).read_bytes(), f"from step {step}"


def test_a_resumed_run_reads_the_scores_that_are_there(
    run: tuple[str, Path], inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, root = run
    before = (root / WEIGHTS).read_bytes()

    def never(*_: Any) -> Any:
        raise AssertionError("scored twice")

    monkeypatch.setattr(Perplexity, "_score", never)
    checkpoint = root / "checkpoints" / "step=3.ckpt"
    call([*prune(inputs, root, variant), f"--ckpt_path={checkpoint}"])
    assert (root / WEIGHTS).read_bytes() == before


def test_a_checkpoint_is_measured_with_the_blocks_that_it_has(
    run: tuple[str, Path], inputs: Path
) -> None:
    variant, root = run
    line = call([*prune(inputs, root, variant, "validate"), "--ckpt_path=last"])
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    measured = report["models"]["pruned"]["perplexity"]["validation"]["value"]
    found = float(line.trainer.callback_metrics["val_perplexity"])
    assert found == pytest.approx(measured, rel=1e-5)


def test_it_survives_a_second_fit(run: tuple[str, Path], inputs: Path) -> None:
    variant, root = run
    command = prune(inputs, root, variant)
    with pytest.warns(UserWarning, match="of an earlier run"):
        call(command)
    before = content(root / "model")
    with pytest.warns(UserWarning, match="of an earlier run"):
        call(command)
    assert content(root / "model") == before
    assert {path.name for path in root.iterdir() if path.name[0] == "."} <= {".lock"}


def test_halves_go_one_by_one_and_bring_their_code(inputs: Path, tmp_path: Path) -> None:
    """Two halves, with training in between; a run resumed between them ends as the whole one."""
    whole, again = (
        prune(inputs, tmp_path / name, "all weights", search=HALVES) for name in ("whole", "again")
    )
    call(whole)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step=3.ckpt"
    call([*again, f"--ckpt_path={checkpoint}"])
    root = tmp_path / "whole"
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / file).read_bytes() == (root / file).read_bytes()
    (stage,) = json.loads((root / "model" / "secateur.json").read_text())["stages"]
    depth = stage["provenance"]["depth"]
    units = [Unit.of_key(key) for removal in depth["removals"] for key in removal["units"]]
    assert [unit.part for unit in units] == ["attn", "attn"]
    assert depth["kept_blocks"] == [0, 1, 2, 3]
    base = inputs / "base"
    dense, small = (
        AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True)
        for f in (base, root / "model")
    )
    assert type(small).__module__.endswith("modeling_secateur_llama")
    with bypassed(dense, units):
        assert small.num_parameters() == dense.num_parameters()
    one_by_one = json.loads((root / "model" / "config.json").read_text())["block_widths"]
    assert sum(width == 0 for widths in one_by_one for width in widths.values()) == 2


@pytest.mark.filterwarnings("ignore:.*the gates are expected to keep:UserWarning")
def test_the_report_of_a_chain_starts_at_the_dense_model(inputs: Path, tmp_path: Path) -> None:
    """The two recipes of a chain, one after the other: blocks go, then masks are learned."""
    recipes = Path(__file__).parents[1] / "configs" / "depth"
    roots = tmp_path / "depth", tmp_path / "disp"
    models = inputs / "base", roots[0] / "model"
    names = "chain_1_depth.yaml", "chain_2_disp.yaml"
    for recipe, root, base in zip(names, roots, models, strict=True):
        call(
            [
                "fit",
                f"--config={recipes / recipe}",
                f"--model.base={base}",
                *on_text(inputs, root)[1:],
                "--trainer.max_steps=4",
                "--trainer.val_check_interval=2",
            ]
        )
    stages = json.loads((roots[1] / "report.json").read_text(encoding="utf-8"))["stages"]
    assert [list(stage["provenance"]) for stage in stages] == [["depth"], ["masks"]]
    assert len(stages[0]["provenance"]["depth"]["kept_blocks"]) == 3
    sizes = [
        stage["models"][name]["parameters"] for stage in stages for name in ("dense", "pruned")
    ]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    card = (roots[1] / "model" / "README.md").read_text(encoding="utf-8")
    for text in (card, (roots[1] / "report.md").read_text(encoding="utf-8")):
        rows = [line for line in text.splitlines() if f"| {sizes[0]:,} |" in line]
        assert rows
        assert "| stage 1: depth |" in text
        assert "| stage 2: masks |" in text


@pytest.mark.slow
def test_two_ranks_remove_the_same_blocks_and_train_on(inputs: Path, tmp_path: Path) -> None:
    """A new DDP wrapper: the old one would wait for gradients of blocks that are gone."""
    arguments = [*prune(inputs, tmp_path, "all weights"), "--trainer.devices=2"]
    run = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *arguments, "--trainer.strategy=ddp"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (stage,) = json.loads((tmp_path / "model" / "secateur.json").read_text())["stages"]
    assert stage["steps"] == 6
    assert len(stage["provenance"]["depth"]["kept_blocks"]) == 2
