"""Ranks that were given different things are told; measuring works where the model is divided."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.ranks import flat, refuse_differences
from tests.ranks import Ranks
from tests.runs import (
    NOISE,
    QUICK,
    call,
    from_open_gates,
    learn_masks,
    make_inputs,
    on_text,
    with_callbacks,
    write_text,
)

pytestmark = NOISE


def test_settings_are_named_as_they_are_typed() -> None:
    settings = {
        "seed_everything": 0,
        "trainer": {
            "max_steps": 8,
            "callbacks": [{"class_path": "secateur.SaveCheckpoint", "init_args": {"keep": 2}}],
        },
        "model": {"class_path": "A", "init_args": {"budget": {"keep": 0.5}}},
        "data": {"init_args": {"train": ["a", "b"]}},
    }
    found = dict(flat(settings))
    assert found["model.budget.keep"] == "0.5"
    assert found["data.train"] == "['a', 'b']"
    assert found["trainer.callbacks.keep of SaveCheckpoint"] == "2"
    assert found["seed_everything"] == "0"


def test_the_rank_and_every_setting_that_differs_are_named() -> None:
    same = ("node1", {"data.seed": "0", "model.penalty": "6"})
    refuse_differences([same, same])
    other = ("node2", {"data.seed": "1"})
    message = (
        r"Rank 2 \(node2\) .*: `--data.seed` is 1 there and 0 on rank 0; "
        "`--model.penalty` is None there and 6 on rank 0"
    )
    with pytest.raises(ValueError, match=message):
        refuse_differences([same, same, other])


ON_TWO = ("--trainer.devices=2", "--trainer.strategy=ShardedDDP", "--trainer.logger=false")
REFUSED = {
    "refused_seed": ("--data.seed={rank}", "`--data.seed` is 1 there and 0 on rank 0"),
    "refused_everything": ("--seed_everything={rank}", "`--seed_everything` is 1 there and 0"),
    "refused_steps": ("--trainer.max_steps=1{rank}", "`--trainer.max_steps` is 11 there and 10"),
    "refused_base": ("--model.base=FOLDER/base{rank}", "`--model.base` is [0-9a-f]{64} there"),
    "refused_data": ("--data.train=FOLDER/text{rank}.json", "`--data.train` is [0-9a-f]{64} there"),
    "refused_checkpoint": ("--ckpt_path=FOLDER/{rank}.ckpt", "`--ckpt_path` is [0-9a-f]{32} there"),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks in a folder with two models, two texts and a checkpoint of each."""
    folder = make_inputs(tmp_path_factory.mktemp("ranks"))
    make_inputs(folder / "other", intermediate_size=40)
    for rank, base in enumerate((folder / "base", folder / "other" / "base")):
        shutil.copytree(base, folder / f"base{rank}")
        write_text(folder / f"text{rank}.json", seed=rank)
        run = learn_masks(folder, folder / f"alone{rank}", 2 + rank, ["SaveCheckpoint"])
        call([*run, "--trainer.logger=false", "--trainer.limit_val_batches=0"])
        path = folder / f"alone{rank}" / "checkpoints" / f"step={2 + rank}.ckpt"
        shutil.copy(path, folder / f"{rank}.ckpt")
    started = Ranks(folder)
    yield started
    started.close()


def measure(folder: Path, name: str, root: Path) -> list[str]:
    model = ["--model=MaskLearning", f"--model.base={folder / 'base'}"]
    model = from_open_gates([*model, *QUICK])
    callbacks = with_callbacks(["AnnealSparsity"])
    return [name, *model, *on_text(folder, root), *callbacks, "--ckpt_path=last"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_ranks_of_different_settings_are_refused_by_all(name: str, ranks: Ranks) -> None:
    setting, message = REFUSED[name]
    run = [*learn_masks(ranks.folder, ranks.folder / name, 3, ["SaveCheckpoint"]), *ON_TWO]
    here, there = ranks.errors(name, [*run, setting.replace("FOLDER", str(ranks.folder))])
    assert here == there
    assert here.startswith("Rank 1 (")
    with pytest.raises(ValueError, match=message):
        raise ValueError(here)
    assert not (ranks.folder / name / "checkpoints").exists()


@pytest.mark.slow
def test_a_divided_model_is_measured_as_one_that_is_whole(ranks: Ranks) -> None:
    """Every window by one of the ranks."""
    folder = ranks.folder
    fit = learn_masks(folder, folder / "fit", 3, ["AnnealSparsity", "SaveCheckpoint"])
    ranks.run("fit", [*from_open_gates(fit), *ON_TWO])
    for name in ("validate", "test", "predict"):
        ranks.run(name, [*measure(folder, name, folder / "fit"), *ON_TWO])
    path = f"--ckpt_path={folder / 'fit' / 'checkpoints' / 'step=3.ckpt'}"
    call([*measure(folder, "predict", folder / "one"), path])
    expected, found = {}, {}
    for path, into in ((folder / "one", expected), (folder / "fit", found)):
        for rows in path.glob("predictions_*.csv"):
            with rows.open(encoding="utf-8") as file:
                into |= {row["window"]: float(row["nll"]) for row in csv.DictReader(file)}
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)
