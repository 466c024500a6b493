"""Every recipe is parsed through the command line; the small ones are run for a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from secateur.modules.settling import AllWeights, Gains, LowRank, Trained
from tests.runs import NOISE, QUICK, call, make_inputs

pytestmark = NOISE
CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))
LITTLE_TEXT = {"calibration_windows": 40, "held_back_windows": 8}
SMALL: dict[str, dict[str, dict[str, object]]] = {
    "demo/disp.yaml": {},
    "demo/pretrain.yaml": {},
    "depth/prune_only.yaml": {"PruneBlocks": LITTLE_TEXT},
    "disp.yaml": {},
    "widths/importance.yaml": {
        "PruneWidths": LITTLE_TEXT
        | {
            "search.start.rounds": 2,
            "search.start.batches_per_round": 1,
            "search.start.batch_size": 4,
            "search.rounds": 2,
            "search.batches_per_round": 1,
        }
    },
    "widths/lora_prune.yaml": {
        "PruneWidths": LITTLE_TEXT | {"gradually.every_n_steps": 1, "gradually.over": 0.6}
    },
}
"""Recipes that are run, and what makes their callbacks small."""
# What a recipe leaves to whoever runs it, and what makes it small.
FILL = {"--model.base": "a/model", "--data.train": "text.json"}


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def missing(path: Path) -> list[str]:
    """Arguments for the settings that the header of a recipe asks to be given."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    given = {
        f"--{part}.{key}" for part in ("model", "data") for key in recipe[part].get("init_args", {})
    }
    learns = recipe["model"]["class_path"] == "MaskLearning"
    return [f"{k}={v}" for k, v in FILL.items() if k not in given and (learns or "model" not in k)]


def test_there_are_recipes() -> None:
    assert {"demo/pretrain.yaml", "demo/disp.yaml"} <= {name(path) for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        call(["fit", f"--config={path}", *missing(path), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config["trainer"]["max_steps"] == recipe["trainer"].get("max_steps", -1)
    assert config["model"]["class_path"].endswith(recipe["model"]["class_path"])


@pytest.mark.parametrize("kind", [LowRank, AllWeights])
def test_what_settles_otherwise_takes_its_own_learning_rate(
    kind: type[Trained], capsys: pytest.CaptureFixture[str]
) -> None:
    path = CONFIGS / "disp.yaml"
    choice = f"--model.settle.train={kind.__name__}"
    with pytest.raises(SystemExit):
        call(["fit", f"--config={path}", *missing(path), choice, "--print_config"])
    settle = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["settle"]
    assert settle["train"]["class_path"].endswith(kind.__name__)
    assert settle["train"]["init_args"]["lr"] is None
    assert kind().highest_lr == kind.usual_lr < Gains().highest_lr


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_has_a_header_and_an_output_folder_of_its_own(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    for word in ("command:", "hardware:"):
        assert word in header, word
    folders = [yaml.safe_load(p.read_text())["trainer"]["default_root_dir"] for p in RECIPES]
    assert folders.count(yaml.safe_load(text)["trainer"]["default_root_dir"]) == 1


@pytest.mark.filterwarnings("ignore:.*the gates are expected to keep:UserWarning")
@pytest.mark.parametrize("recipe_name", SMALL)
def test_a_small_recipe_runs(recipe_name: str, tmp_path: Path) -> None:
    path = CONFIGS / recipe_name
    make_inputs(tmp_path, num_hidden_layers=4)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = [
        f"--data.train={tmp_path / 'text.json'}",
        f"--data.tokenizer={tmp_path / 'base'}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.window_tokens=16",
        "--data.batch_size=4",
        "--data.validation_windows=4",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        *(QUICK if recipe["model"]["class_path"] == "MaskLearning" else ()),
    ]
    settings += [
        f"--callbacks.{callback}.{setting}={value}"
        for callback, small in SMALL[recipe_name].items()
        for setting, value in small.items()
    ]
    if "architecture" not in recipe["model"].get("init_args", {}):
        settings.append(f"--model.base={tmp_path / 'base'}")
    call(["fit", f"--config={path}", *settings])
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert list((tmp_path / "run" / "metrics").rglob("metrics.csv"))
