"""One run that learns masks for several sizes, and a run per size: nested, and reproducible."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.family import main
from secateur.pruning.plan import Plan
from tests.runs import NOISE, call, content, learn_masks, make_inputs

pytestmark = NOISE
KEEPS = (0.8, 0.65, 0.5)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def settings(inputs: Path, root: Path) -> list[str]:
    """Settings of `fit`, with a setting of a callback by name."""
    return [*learn_masks(inputs, root)[1:], "--callbacks.ExportModel.folder=out"]


def family(inputs: Path, root: Path, *more: str) -> None:
    steps = ("--mask-steps", "5", "--settle-steps", "3")
    main(["--keep", *map(str, KEEPS), *steps, *settings(inputs, root), *more])


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    family(inputs, root)
    return root


def test_sizes_are_nested_trained_and_exported(made: Path) -> None:
    plans = [Plan.load(made / f"keep_{keep}" / "plan") for keep in KEEPS]
    for larger, smaller in pairwise(plans):
        for outer, inner in zip(larger.kept, smaller.kept, strict=True):
            assert bool(torch.isin(inner, outer).all())
        assert sum(smaller.widths) < sum(larger.widths)
    for keep, plan in zip(KEEPS, plans, strict=True):
        assert keep - 0.02 < plan.provenance["kept"] <= keep
        assert plan.provenance["masks"] == plans[0].provenance["masks"]  # one choice for all
        assert plan.provenance["training"] in ("kept", "left out")
        model: Any = AutoModelForCausalLM.from_pretrained(
            made / f"keep_{keep}" / "out", trust_remote_code=True
        )
        assert model(torch.tensor([[1, 5, 7]])).logits.isfinite().all()
    last = torch.load(made / "keep_0.65" / "checkpoints" / "step=8.ckpt", weights_only=True)
    assert last["settled"]["settled_at"] == 5
    assert not (made / "masks" / "out").exists()


def test_the_report_has_all_sizes_beside_the_dense_model(made: Path) -> None:
    models = json.loads((made / "report.json").read_text("utf-8"))["models"]
    assert [*models] == ["dense", *(f"keep {keep}" for keep in KEEPS)]
    kept = [figures["kept_block_flops"] for figures in models.values()]
    assert kept == sorted(kept, reverse=True)
    page = (made / "report.html").read_text("utf-8")
    assert page.count("<figure>") == 5
    assert "3 sizes of base (llama" in page
    assert "steps that learn masks" in page
    own = json.loads((made / "keep_0.5" / "report.json").read_text("utf-8"))["models"]["pruned"]
    quality = models["keep 0.5"]["perplexity"]["validation"]["value"]
    assert quality == pytest.approx(own["perplexity"]["validation"]["value"], rel=1e-5)


def test_a_size_is_what_one_run_to_the_end_would_have_made(
    made: Path, inputs: Path, tmp_path: Path
) -> None:
    """Not even the order of the text differs."""
    sizes = {"keep": KEEPS, "seed": 0}
    more = [f"--model.learning.sizes={json.dumps(sizes)}", "--model.budget.keep=0.65"]
    root = f"--trainer.default_root_dir={tmp_path}"
    run = ["fit", *settings(inputs, tmp_path), *more, root]
    call([*run, "--trainer.max_steps=8", "--model.settle.fraction=0.375"])
    name = "model.safetensors"
    assert content(tmp_path / "out")[name] == content(made / "keep_0.65" / "out")[name]


def test_the_same_command_goes_on_and_another_family_is_refused(made: Path, inputs: Path) -> None:
    """A size that was lost, with its last checkpoint, is made again from the masks."""
    before = content(made / "keep_0.65" / "out")["model.safetensors"]
    for path in (made / "keep_0.65" / "checkpoints").iterdir():
        path.unlink()
    family(inputs, made)
    assert content(made / "keep_0.65" / "out")["model.safetensors"] == before
    with pytest.raises(ValueError, match="`--model.learning` was .*Sizes"):
        main(
            [
                *("--keep", "0.9", "0.5", "--mask-steps", "5", "--settle-steps", "3"),
                *settings(inputs, made),
            ]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--keep", "0.5", "0.8"], "`--keep` must have different fractions, the largest first"),
        (["--keep", "0.5"], "`--keep` must have two fractions or more"),
        (["--mask-steps", "-1"], "`--mask-steps` must be 0 or more, got -1"),
        (["--trainer.callbacks=[]"], "`--trainer.callbacks` lacks SaveCheckpoint"),
    ],
)
def test_a_family_that_makes_no_sense_is_refused_before_anything_is_read(
    change: list[str], message: str, inputs: Path, tmp_path: Path
) -> None:
    steps = ("--keep", "0.8", "0.5", "--mask-steps", "5", "--settle-steps", "3")
    fit = learn_masks(inputs, tmp_path)[1:]
    with pytest.raises(ValueError, match=message):
        main([*steps, *fit, *change])
    assert not (tmp_path / "masks").exists()


def test_the_own_budget_is_one_of_the_sizes(inputs: Path, tmp_path: Path) -> None:
    run = [*learn_masks(inputs, tmp_path), '--model.learning.sizes={"keep": [0.9, 0.8]}']
    with pytest.raises(ValueError, match=r"`--model.budget.keep` 0.5 must be one of `--model.lear"):
        call(run)


def test_without_steps_there_is_the_ranking_to_cut(inputs: Path, tmp_path: Path) -> None:
    """A checkpoint from before the ranking does not stand for gates without one."""
    root = tmp_path / "family"
    steps = ("--mask-steps", "0", "--settle-steps", "0")
    main(["--keep", "0.8", "0.5", *steps, *settings(inputs, root)])
    alone = learn_masks(inputs, tmp_path / "alone", max_steps=0)
    call(alone)
    plans = [Plan.load(folder / "plan") for folder in (root / "keep_0.5", tmp_path / "alone")]
    kept = sum(map(len, plans[0].kept))
    same = sum(
        int(torch.isin(a, b).sum()) for a, b in zip(plans[0].kept, plans[1].kept, strict=True)
    )
    assert same >= 0.95 * kept
