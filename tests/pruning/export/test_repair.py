from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.pruning.export.repair import main, repair
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.plan import DESCRIPTION, TENSORS, Plan
from tests.pruning.export.plans import uneven_plan, uniform_plan
from tests.runs import content
from tests.tiny import tiny_folder


def of_old(folder: Path) -> None:
    """Make of an export what earlier versions wrote."""
    for name in (DESCRIPTION, TENSORS):
        (folder / "plan" / name).rename(folder / name)
    (folder / "plan").rmdir()


@pytest.mark.parametrize("plan_of", [uneven_plan, uniform_plan])
def test_an_export_of_old_becomes_one_of_today(
    plan_of: Callable[[Path], Plan], tmp_path: Path
) -> None:
    base, small = tiny_folder(tmp_path / "base"), tmp_path / "small"
    prune_checkpoint(base, plan_of(base), small)
    today = content(small)
    assert [path.name for path in small.glob("*.safetensors")] == ["model.safetensors"]
    of_old(small)
    assert Plan.load(small).widths == plan_of(base).widths
    config = json.loads((small / "config.json").read_text(encoding="utf-8"))
    if plan_of is uneven_plan:
        for path in small.glob("*.py"):
            path.unlink()
        (small / "modeling_secateur.py").write_text("# of all families\n", encoding="utf-8")
        config["auto_map"] = {"AutoConfig": "modeling_secateur.SecateurLlamaConfig"}
        (small / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert len(repair(small)) == (5 if plan_of is uneven_plan else 1)
    assert content(small) == today
    assert repair(small) == []


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, small = tiny_folder(tmp_path / "base"), tmp_path / "small"
    prune_checkpoint(base, uneven_plan(base), small)
    of_old(small)
    main([str(small)])
    assert capsys.readouterr().out == "The plan was moved into plan/.\n"
    main([str(small)])
    assert "is up to date" in capsys.readouterr().out


def test_a_folder_that_is_not_ours_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_folder(tmp_path / "base")
    before = content(base)
    with pytest.raises(ValueError, match="Give the `model` folder of a run"):
        main([str(base)])
    assert content(base) == before
