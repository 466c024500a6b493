from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur.pruning.export.ranks
from secateur.pruning.costs import Parameters
from secateur.pruning.export.deliver import deliver
from secateur.pruning.export.ranks import OneRank
from secateur.pruning.export.sources import FromFiles
from secateur.pruning.export.stages import MARK, Origin, read_stages
from secateur.pruning.families import family_of
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget
from tests.runs import content
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "base")


def make_plan(base: Path) -> Plan:
    model = BaseModel(base).load()
    sites = find_sites(model, family_of(model.config))
    budget = Budget(keep=0.5, cost=Parameters())
    scores_N = torch.rand(
        sum(site.size for site in sites), generator=torch.Generator().manual_seed(0)
    )
    kept = budget.finalise(scores_N, sites, budget.cost.table(model))
    return plan_from_indices(
        model, fingerprint(base), kept, {"counted": "block flops", "kept": 0.5}
    )


def run(base: Path, folder: Path, model: Any = None) -> Any:
    windows_NT = torch.randint(320, (5, 16), generator=torch.Generator().manual_seed(1))
    plan, dense = make_plan(base), BaseModel(base).load() if model is None else model
    masks = {"masks": dict(plan.provenance)}
    origin = Origin(str(base), base, plan.base, "python train.py fit", 0, masks)
    one = OneRank(base, torch.device("cpu"))
    return deliver(FromFiles(plan, dense), origin, folder, windows_NT, one, measured=True)


def test_the_report_beside_the_model_says_what_it_costs_and_how_fast_it_is(
    base: Path, tmp_path: Path
) -> None:
    report = run(base, tmp_path / "model")
    figures = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    pruned = figures["models"]["pruned"]
    assert pruned["kept_block_parameters"] == pytest.approx(0.5, abs=0.01)
    assert pruned["speed"]["decode_seconds"] > 0
    value = report.rows[1].perplexity["validation"].value
    assert pruned["perplexity"]["validation"]["value"] == pytest.approx(value)
    assert "pruned" in (tmp_path / "report.md").read_text(encoding="utf-8")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>Pruned: base (llama, " in page
    assert report.rows[1].generation.answers[0].prompt
    for said in ("What they answer", "five widths", "python train.py fit", "processor time"):
        assert said in page
    plan = make_plan(base)
    for folder in ("plan", "model"):
        loaded = Plan.load(tmp_path / folder)
        assert all(torch.equal(a, b) for a, b in zip(loaded.kept, plan.kept, strict=True))


def test_the_page_draws_the_newest_metrics_of_the_run(base: Path, tmp_path: Path) -> None:
    for version, steps in ((9, 1), (10, 2)):
        folder = tmp_path / "metrics" / f"version_{version}"
        folder.mkdir(parents=True)
        rows = [f"{step},{30 - step}" for step in range(steps)]
        (folder / "metrics.csv").write_text("\n".join(["step,val_perplexity", *rows]) + "\n")
    run(base, tmp_path / "model")
    assert 'alt="Quality against steps"' in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_two_deliveries_of_one_plan_are_equal(base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(base, tmp_path / name / "model")
    for folder in ("model", "plan"):
        assert content(tmp_path / "one" / folder) == content(tmp_path / "two" / folder)


def test_a_failure_while_measuring_leaves_nothing_and_keeps_the_old(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(base, tmp_path / "model")
    before = content(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(secateur.pruning.export.ranks, "measure", fail)
    with pytest.raises(OSError, match="No space left"):
        run(base, tmp_path / "model")
    assert content(tmp_path) == before


def test_a_model_that_is_not_the_base_is_found_out(base: Path, tmp_path: Path) -> None:
    other = BaseModel(base).load()
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.5)
    with pytest.raises(ValueError, match="differs from the masked one.*block 1"):
        run(base, tmp_path / "model", model=other)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "plan").exists()


def test_the_report_of_masks_has_the_earlier_stage(tmp_path: Path) -> None:
    base, before = tiny_folder(tmp_path / "base"), {"parameters": 9, "flops_per_token": 90}
    stage = {
        "base": "the first",
        "provenance": {"depth": {"kept_blocks": [0, 2]}},
        "context_tokens": 16,
        "models": {
            "dense": before | {"perplexity": {"validation": 5.0}},
            "pruned": before | {"perplexity": {"validation": 6.5}},
        },
    }
    (base / MARK).write_text(json.dumps({"stages": [stage]}), encoding="utf-8")
    report = run(base, tmp_path / "model")
    first, second = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["stages"]
    assert first == stage
    assert second["models"]["pruned"]["parameters"] == report.rows[1].counts.parameters
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert card.index("`the first`") < card.index("stage 1: depth") < card.index("stage 2: masks")
    assert read_stages(tmp_path / "model") == [first, second]  # for a stage after this one
    (base / MARK).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="secateur.json is damaged.*export the model again"):
        read_stages(base)


def test_what_a_user_has_put_beside_the_weights_is_never_removed(
    base: Path, tmp_path: Path
) -> None:
    run(base, tmp_path / "model")
    run(base, tmp_path / "model")  # our own files are replaced
    (tmp_path / "model" / "adapter").mkdir()
    with pytest.raises(ValueError, match="holds adapter, which Secateur did not write"):
        run(base, tmp_path / "model")
    assert (tmp_path / "model" / "adapter").is_dir()
