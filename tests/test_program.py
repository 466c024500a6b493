"""What a user sees of the program: one to three lines for every mistake, and no traceback."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
import yaml

import secateur.callbacks
import secateur.modules
from secateur import program, yaml_text
from secateur.command_line import TrainCLI
from secateur.mistakes import explain
from secateur.pruning.commands import UsageError
from secateur.pruning.files.checkpoints import seal, write_whole
from secateur.pruning.files.settings import refuse_other
from secateur.pruning.widths.exchange import Exchange
from secateur.signatures import hints_of, objects_of, parameters_of, subclasses_of
from secateur.trainer_settings import check_trainer
from tests.runs import NOISE, learn_masks, make_inputs

pytestmark = NOISE


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def told(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int = 2,
) -> str:
    """What the program says of a mistake."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.delenv("SECATEUR_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        program.run()
    said = capsys.readouterr().err
    assert stop.value.code == code, said
    message = said[said.index("error: ") :].strip()
    assert 1 <= len(message.splitlines()) <= 3
    assert "Traceback" not in said
    assert "Namespace(" not in said
    return message


RECIPES = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
FILLED = ("--model.base=a/model", "--data.train=text.json")  # what recipes leave to their users
# A setting of every callback of the recipes, and a value that no recipe gives it.
NAMED: dict[str, tuple[str, Any]] = {
    "AnnealSparsity": ("over", 0.123),
    "ExportModel": ("folder", "out"),
    "PlotWidths": ("folder", "pictures"),
    "PruneBlocks": ("calibration_seed", 123),
    "PruneWeights": ("calibration_seed", 123),
    "PruneWidths": ("held_back_windows", 123),
    "SaveCheckpoint": ("every_n_steps", 123),
    "TrackBudget": ("tolerance", 0.123),
    "WatchRanks": ("patience_seconds", 123.0),
}


class Parsed(Exception):
    """Arguments were taken."""


@pytest.fixture(scope="module")
def line() -> TrainCLI:
    """A command line that has parsed and made nothing; to make a parser takes seconds."""
    made: list[TrainCLI] = []

    def stop(line: TrainCLI) -> None:
        made.append(line)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainCLI, "_set_seed", stop)
        patch.setattr(sys, "argv", ["train.py", *learn_masks(Path("in"), Path("out"))])
        with pytest.raises(Parsed):
            program.train()
    return made[0]


def taken(line: TrainCLI, arguments: list[str]) -> dict[str, Any]:
    """Settings of every callback by the name of its class, of arguments that are taken."""
    line.parse_arguments(line.parser, arguments)
    callbacks = line.config["fit"].trainer.callbacks
    return {c.class_path.rpartition(".")[2]: c.init_args.as_dict() for c in callbacks}


def test_callbacks_are_set_by_name(line: TrainCLI, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "trainer: {callbacks: [{class_path: TrackBudget}, "
        "{class_path: SaveCheckpoint, init_args: {keep: 5}}, {class_path: ExportModel}]}"
    )
    found = taken(
        line,
        [
            *learn_masks(Path("in"), Path("out"), callbacks=()),
            f"--config={recipe}",
            *("--callbacks.SaveCheckpoint.every_n_steps", "50"),
            "--callbacks.TrackBudget.tolerance=0.25",
        ],
    )
    assert found["SaveCheckpoint"]["every_n_steps"] == 50
    assert found["SaveCheckpoint"]["keep"] == 5
    assert found["TrackBudget"]["tolerance"] == 0.25
    assert list(found) == ["TrackBudget", "SaveCheckpoint", "ExportModel"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--callbacks.SaveCheckpoin.keep=1", r"names no callback .* Did you mean `SaveCheckpoint`"),
        (
            "--callbacks.SaveCheckpoint.kep=1",
            r"`--callbacks.SaveCheckpoint.kep` is not a setting of SaveCheckpoint. "
            r"Did you mean `--callbacks.SaveCheckpoint.keep`",
        ),
        ("--callbacks.SaveCheckpoint=1", r"names a callback; it must name one setting"),
        ("--callbacks.SaveCheckpoint.keep", r"must be followed by a value"),
        (
            "--callbacks.SaveCheckpoint.keep=x",
            r"`--callbacks.SaveCheckpoint.keep` must be a whole number, got 'x'",
        ),
        (
            "--callbacks.SaveCheckpoint.keep.x=1",
            r"`--callbacks.SaveCheckpoint.keep.x` is not a setting: "
            r"`--callbacks.SaveCheckpoint.keep` is a whole number",
        ),
        (
            "--callbacks.SaveCheckpoint.keep=null",
            r"`--callbacks.SaveCheckpoint.keep` must be a whole number, got null",
        ),
        (
            "--callbacks.AnnealSparsity.curve=Cubik",
            r"`--callbacks.AnnealSparsity.curve` names Cubik: no such class. Did you mean `Cubic`",
        ),
    ],
)
def test_wrong_settings_of_callbacks_by_name(line: TrainCLI, setting: str, message: str) -> None:
    assert re.search(message, refused(line, [*learn_masks(Path("in"), Path("out")), setting]))


IN_WIDTHS = {
    "score=Fishr": "`--callbacks.PruneWidths.score` names Fishr: .* mean `Fisher`?",
    "score=secateur.Linear": "`--callbacks.PruneWidths.score` names secateur.Linear, which is not",
    "scor=Fisher": "`--callbacks.PruneWidths.scor` .* mean `--callbacks.PruneWidths.score`?",
    "keep=0.7": "Did you mean `--callbacks.PruneWidths.budget.keep`?",
    "budget.kep=0.7": "`--callbacks.PruneWidths.budget.kep` is not a setting of Budget.",
    "budget.keep=half": "`--callbacks.PruneWidths.budget.keep` must be a number, got 'half'",
    "budget={kep: 0.7}": "`--callbacks.PruneWidths.budget.kep` is not a setting of Budget.",
    "score.alpha=1": "`--callbacks.PruneWidths.score.alpha` is not a setting of Fisher",
    "search.rounds=a": "`--callbacks.PruneWidths.search.rounds` must be a whole number, got 'a'",
    "search.score.x=1": "`--callbacks.PruneWidths.search.score` is not a setting of Exchange",
}


@pytest.mark.parametrize(("setting", "message"), IN_WIDTHS.items(), ids=IN_WIDTHS)
def test_settings_inside_a_callback_are_told_by_its_name(
    setting: str, message: str, line: TrainCLI
) -> None:
    recipe = next(path for path in RECIPES if path.name == "importance.yaml")
    named = f"--callbacks.PruneWidths.{setting}"
    said = refused(line, ["fit", f"--config={recipe}", *FILLED, named])
    assert re.search(message.replace("?", r"\?"), said), said
    assert "trainer.callbacks" not in said


def classes_of_settings() -> Iterator[type]:
    """All classes of this library that a configuration can name, however deep."""
    named = [(secateur.callbacks, name) for name in secateur.callbacks.__all__]
    named += [(secateur.modules, name) for name in secateur.modules.__all__]
    todo, seen = [getattr(*each) for each in named], set[type]()
    while todo:
        for kind in subclasses_of(todo.pop()):
            if kind not in seen and kind.__module__.startswith("secateur."):
                seen.add(kind)
                todo += [found for hint in hints_of(kind).values() for found in objects_of(hint)]
                yield kind


def test_types_of_all_settings_are_known() -> None:
    """Also of those that a class inherits from another module."""
    classes = [*classes_of_settings()]
    assert Exchange in classes
    assert all(set(parameters_of(kind)) <= set(hints_of(kind)) for kind in classes)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_callback_of_a_recipe_is_set_by_name(path: Path, line: TrainCLI) -> None:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = [each["class_path"] for each in recipe["trainer"]["callbacks"]]
    given = {name: NAMED[name] for name in names}
    settings = [f"--callbacks.{name}.{key}={value}" for name, (key, value) in given.items()]
    found = taken(line, ["fit", f"--config={path}", *FILLED, *settings])
    assert list(found) == names
    assert {name: found[name][key] for name, (key, _) in given.items()} == {
        name: value for name, (_, value) in given.items()
    }


def refused(line: TrainCLI, arguments: list[str]) -> str:
    """What is said of arguments that are not taken."""
    with pytest.raises(UsageError) as error:
        line.parse_arguments(line.parser, arguments)
    message = explain(error.value)
    assert message is not None
    assert len(message.splitlines()) == 1
    assert "Namespace(" not in message
    return message


MISSPELT = {
    "--trainer.max_step=5": "`--trainer.max_step` is not a setting .* mean `--trainer.max_steps`?",
    "--model.budget.kep=0.4": "`--model.budget.kep` .* of Budget. .* mean `--model.budget.keep`?",
    "--model.keep=0.4": "Did you mean `--model.budget.keep`?",
    "--model.hypernetwork=GRUHypernetwork --model.hypernetwork.hiden_size=4": (
        "Did you mean `--model.hypernetwork.hidden_size`?"
    ),
    "--data.windowtokens=16": "`--data.windowtokens` .* Did you mean `--data.window_tokens`?",
    "--trainer.callbacks.folders=a": "setting of ExportModel. .* `--trainer.callbacks.folder`?",
    "--trainer.callbacks+=SaveCheckpont": "no such class. Did you mean `SaveCheckpoint`?",
    "--trainer.callbacks+=CausalLM": "CausalLM: no such class",
    "--trainer.callbacks+=secateur.CausalLM": "secateur.CausalLM, which is not a Callback",
    "--model.optimizer=torch.optim.AdmW": "no such class. Did you mean `AdamW`?",
    "--model.optimizer=torhc.optim.AdamW": "torhc.optim.AdamW, which cannot be imported",
    "--model=MaskLerning": "`--model` names MaskLerning: .* mean `MaskLearning`?",
    "--ckptpath=last": "`--ckptpath` is not a setting. Did you mean `ckpt_path`?",
    "--model.learning.start.scale=a": "`--model.learning.start.scale` must be a number, got 'a'",
    "--model.budget.keep=half": "`--model.budget.keep` must be a number, got 'half'",
    "--trainer.max_steps=1.5": "`--trainer.max_steps` must be a whole number, got '1.5'",
    "--trainer.precision=bf17": "`--trainer.precision` must be .* bf16-mixed .* got 'bf17'",
    "--seed_everything=abc": "`--seed_everything` must be a whole number, got 'abc'",
    "--model.penalty=5": "of MaskLearning. It is `--model.learning.pressure.strength` now.",
    "--model.loss.distillation=1": "It is `--model.learning.loss` now.",
    "--model.settle=0.3": "got '0.3'. It is `--model.settle.fraction` now.",
    "--trainer.logger=false --trainer.max_epochs=x": "`--trainer.max_epochs` must be a whole .*'x'",
    "--trainer.max_steps=[1,2]": "`--trainer.max_steps` must be a whole number, got a list",
    "--trainer.max_steps.x=5": "`--trainer.max_steps.x` is not a setting: .* is a whole number",
    "--trainer.callbacks.folder=null": "`--trainer.callbacks.folder` must be text, got null",
    "--model.budget=null": "`--model.budget` must be Budget, got null",
    "--model.optimizer=null": "`--model.optimizer` must be Optimizer, got null",
    "--model.budget.keep=.nan": "`--model.budget.keep` must be a number, got .nan",
    "--model.learning={pressure: {class_path: Penalty, init_args: {strength: .inf}}}": (
        "`--model.learning.pressure.strength` must be a number, got inf"
    ),
    "--model.learning.pressure.strength=1": (
        "not a setting of ExactBudget. Set `--model.learning.pressure` to Penalty, which has it."
    ),
    "--model.optimizer=torch.optim.AdamW --model.optimizer.lr=nan": (
        "`--model.optimizer.lr` must be a number or Tensor, got 'nan'"
    ),
    "--model=secateur.modules": "names secateur.modules, which is not a LightningModule",
    "--data.train=null": "`--data.train` must be text, got null",
    "--data.train": "`--data.train` must be followed by a value",
    "--config": "`--config` must be followed by a value",
    "--config=/no/such.yaml": "`--config` /no/such.yaml cannot be read: No such file",
}


@pytest.mark.parametrize(("setting", "message"), MISSPELT.items(), ids=MISSPELT)
def test_a_setting_that_is_not_taken_is_named_with_what_may_be_meant(
    setting: str, message: str, line: TrainCLI
) -> None:
    typed = setting.split(" --")
    typed = [typed[0], *(f"--{other}" for other in typed[1:])]
    said = refused(line, [*learn_masks(Path("in"), Path("out")), *typed])
    assert re.search(message.replace("?", r"\?"), said), said


RECIPE = """\
trainer:
  max_steps: 8
  callbacks:
    - class_path: SaveCheckpoint
      init_args: {every_n_steps: 3}
model:
  class_path: MaskLearning
  init_args:
    base: BASE
    budget: {keep: 0.5}
data:
  class_path: TextData
  init_args: {train: text.json}
"""
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
BAD_RECIPES = {
    "budget": ("keep:", "kep:", "`model.budget.kep` in .* mean `model.budget.keep`?"),
    "trainer": ("max_steps", "max_step", "`trainer.max_step` in .* `trainer.max_steps`?"),
    "callback": ("every_n_steps", "every_steps", "`trainer.callbacks.every_n_steps`?"),
    "group": ("data:", "date:", "`date` in .* is not a setting. Did you mean `data`?"),
    "class": ("TextData", "TextDate", "`data` in .* names TextDate: .* mean `TextData`?"),
    "init_args": ("init_args:\n    base", "init_arg:\n    base", "`model.init_args`?"),
    "value": ("keep: 0.5", "keep: half", "`model.budget.keep` in .* must be a number, got 'half'"),
    "required": ("    base: BASE\n", "", "`--model.base` must be given"),
    "syntax": ("{keep: 0.5}", "{keep: 0.5", "is not YAML: line 1[0-9]: "),
    "twice": (
        "  max_steps: 8",
        "  max_steps: 8\n  max_steps: 9",
        "line 2: `max_steps` is given twice",
    ),
    "list": ("trainer:", "- trainer:", "is not YAML: line"),
    "code": ("BASE", "!!python/object/apply:os.getcwd []", "not YAML: line 9: .* for the tag"),
    "bomb": ("trainer:", f"{BOMB}trainer:", "it expands to more than 100,000 values"),
    "cycle": ("8", "&a [*a]", "line 2: an alias refers to a node that contains it"),
    "deep": ("8", "[" * 5000, "it is nested too deeply"),
    "large": ("8", "8 " + "#" * 1_000_000, "it has more than 1,000,000 characters"),
    "empty": (RECIPE, "", "holds no settings"),
}


@pytest.mark.parametrize(("old", "new", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_bad_recipe_is_told_by_file_and_setting(
    old: str,
    new: str,
    message: str,
    line: TrainCLI,
    tmp_path: Path,
) -> None:
    assert old in RECIPE
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))
    said = refused(line, ["fit", f"--config={tmp_path / 'recipe.yaml'}"])
    assert re.search(message.replace("?", r"\?"), said), said


OLD = {
    "modules.MaskLearning": "secateur.modules.mask_learning.MaskLearning",
    "modules.text_data.TextData": "secateur.modules.data.text_data.TextData",
    "callbacks.SaveCheckpoint": "secateur.callbacks.save_checkpoint.SaveCheckpoint",
    "pruning.hypernetwork.GRUHypernetwork": "secateur.pruning.widths.hypernetwork.GRUHypernetwork",
    "pruning.depth.Magnitude": "secateur.pruning.depth.scores.BlockMagnitude",
    "pruning.weights.magnitude.Magnitude": "secateur.pruning.weights.magnitude.Magnitude",
    "pruning.depth.perplexity.Perplexity": "secateur.pruning.depth.perplexity_score.Perplexity",
    "modules.Zero": "secateur.modules.strategies.zero.Zero",
    "pruning.no.Such": "pruning.no.Such",
    "callbacks": "callbacks",
}


@pytest.mark.parametrize(("old", "now"), OLD.items(), ids=OLD)
def test_classes_are_known_by_the_paths_that_they_had(old: str, now: str) -> None:
    assert yaml_text.present({"class_path": old, "init_args": [old, 1]}) == {
        "class_path": now,
        "init_args": [now, 1],
    }


def test_a_recipe_that_is_no_text_is_told(line: TrainCLI, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xc0\x80")
    said = refused(line, ["fit", f"--config={tmp_path / 'recipe.yaml'}"])
    assert re.search("`--config` .*recipe.yaml is not YAML: 'utf-8' codec", said), said


def test_a_recipe_with_old_paths_is_taken(line: TrainCLI, tmp_path: Path) -> None:
    old = RECIPE.replace("MaskLearning", "modules.MaskLearning").replace(
        "TextData", "modules.TextData"
    )
    (tmp_path / "recipe.yaml").write_text(old.replace("SaveCh", "callbacks.SaveCh"))
    arguments = ["fit", f"--config={tmp_path / 'recipe.yaml'}", "--trainer.strategy=modules.Zero"]
    line.parse_arguments(line.parser, [*arguments, "--trainer.callbacks+=callbacks.ExportModel"])
    config = line.config["fit"]
    assert config.model.class_path.endswith(".mask_learning.MaskLearning")
    assert config.trainer.strategy.endswith(".zero.Zero")
    names = [each.class_path.rpartition(".")[2] for each in config.trainer.callbacks]
    assert names == ["SaveCheckpoint", "ExportModel"]


# Settings that are taken and refused later


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--model.budget.keep=1.5", "`--model.budget.keep` must be in (0, 1], got 1.5."),
        ("--model.settle.fraction=2", "`--model.settle.fraction` must be in [0, 1], got 2"),
        ("--model.base=/no/such", "`--model.base` '/no/such' does not exist"),
        ("--data.window_tokens=65", "`--data.window_tokens` 65 is longer than the 64 positions"),
        ("--data.train=/no/such.json", "`--data.train`: there is no file /no/such.json"),
        ("--trainer.max_steps=-1", "`--trainer.max_steps` must be set"),
        ("--trainer.callbacks.folder=plan", "`--trainer.callbacks.folder` of ExportModel"),
        ("--callbacks.ExportModel.folder=plan", "`--callbacks.ExportModel.folder` of ExportModel"),
        ("--callbacks.SaveCheckpoint.keep=0", "`--callbacks.SaveCheckpoint.keep` must be 1 or mor"),
        ("--callbacks.AnnealSparsity.over=2", "`--callbacks.AnnealSparsity.over` must be in [0, 1"),
        ("--ckpt_path=best", "`--ckpt_path` is best, but"),
        ("--model.budget.width_multiple=25", "`--model.budget.width_multiple` 25 is larger than"),
    ],
)
def test_settings_are_named_as_they_are_typed(
    setting: str,
    message: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*learn_masks(inputs, tmp_path / "run"), setting]
    assert message in told(arguments, monkeypatch, capsys, code=1)


ODD = {
    "accumulate_grad_batches": (-1, "must be 1 or more, got -1"),
    "gradient_clip_val": (-1.0, "must be 0 or more, got -1.0"),
    "max_steps": (-5, "must be -1 or more, got -5"),
    "val_check_interval": (0.5, "must be a whole number of batches, 1 or more, got 0.5"),
    "limit_train_batches": (0, "is 0, so that nothing is trained"),
    "barebones": (True, "leaves out logs and checkpoints"),
    "precision": ("bf16-true", "Use 32-true with `--model.dtype bfloat16`, or bf16-mixed"),
    "strategy": ("ddp_spawn", "Use ddp, which starts new processes"),
    "devices": ("-2", "must be 1 or more, or -1 for all, got -2"),
    "accelerator": ("gpu", "sees no GPU here; use cpu"),
}
PLAIN = {
    "default_root_dir": "runs", "accumulate_grad_batches": 1, "gradient_clip_val": None,
    "log_every_n_steps": 50,
    "max_epochs": -1, "max_steps": 8, "num_nodes": 1, "num_sanity_val_steps": None,
    "val_check_interval": None, "limit_train_batches": None, "barebones": False,
    "precision": None, "strategy": "auto", "devices": "auto", "accelerator": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_trainer_is_not_told_what_it_would_do_otherwise(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    check_trainer(SimpleNamespace(**PLAIN), fitting=True)
    value, message = ODD[name]
    with pytest.raises(ValueError, match=f"`trainer.{name}` ?.*{re.escape(message)}"):
        check_trainer(SimpleNamespace(**PLAIN | {name: value}), fitting=True)


@pytest.mark.parametrize("every", [0, -1, 1.0])
def test_validation_is_timed_in_batches(every: float) -> None:
    with pytest.raises(ValueError, match=f"1 or more, got {every}"):
        check_trainer(SimpleNamespace(**PLAIN | {"val_check_interval": every}), fitting=True)


@pytest.mark.filterwarnings("ignore::jsonargparse._util.JsonargparseWarning")
@pytest.mark.parametrize(
    ("setting", "message", "code"),
    [
        ("--seed_everything=-1", "`--seed_everything` must be in [0, 2^32), got -1.", 2),
        ("--trainer.default_root_dir=/proc/no", "`--trainer.default_root_dir` /proc/no cannot", 1),
        ("--data.cache_dir=/proc/no", "`--data.cache_dir` /proc/no cannot be made", 1),
        ("--trainer.devices=-2", "`--trainer.devices` must be 1 or more", 1),
        ("--trainer.devices=abc", "`--trainer.devices` abc: ", 1),
        ("--trainer.limit_val_batches=7.5", "`--trainer.limit_val_batches` 7.5: You have", 1),
        ("--trainer.max_time=abc", "`--trainer.max_time` abc: ", 1),
        ("--trainer.num_nodes=2", "`--trainer.num_nodes` is 2, and nothing here starts ranks", 1),
        ("--trainer.strategy=dpp", "`--trainer.strategy` dpp is not known; .* mean `ddp`?", 1),
        ("--trainer.strategy=secateur.No", "`--trainer.strategy` names secateur.No: no such", 2),
        ("--model.base=~nobody/x", "`--model.base` '~nobody/x' does not exist", 1),
        ("--model.frozen.dtype=float8_e4m3fn", "`--model.frozen.dtype` must be auto or", 1),
        ("--data.train=", "`--data.train` has an empty name; give a file", 1),
        (
            "--model.optimizer=torch.optim.AdamW --model.optimizer.lr=-1.0",
            "`--model.optimizer` does not take its settings: Inv",
            1,
        ),
        (
            "--model.hypernetwork=SharedHeads --model.hypernetwork.hidden_size=0",
            "`--model.hypernetwork.hidden_size` must be 1 or more, got 0",
            1,
        ),
        (
            "--trainer.callbacks+=lightning.pytorch.callbacks.StochasticWeightAveraging "
            "--trainer.callbacks.swa_lrs=0.1",
            "has StochasticWeightAveraging, which keeps copies of the weights",
            1,
        ),
        (
            "--trainer.val_check_interval=1 --trainer.callbacks.folder=model "
            "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping "
            "--trainer.callbacks.monitor=val_los",
            "metric `val_los` which is not available",
            1,
        ),
    ],
)
def test_odd_settings_end_in_a_message(
    setting: str,
    message: str,
    code: int,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [*learn_masks(inputs, tmp_path / "run", 4), *setting.split()]
    said = told(arguments, monkeypatch, capsys, code)
    assert all(part in said for part in message.split(" .* ")), said


def test_a_port_in_use_is_told_with_the_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError) as error:
            torch.distributed.TCPStore("127.0.0.1", taken.getsockname()[1], 1, True)
    message = explain(error.value)
    assert message is not None
    assert "MASTER_PORT names another port" in message


def test_what_a_checkpoint_lacks_is_told_as_such() -> None:
    source = "def restore_loops(state):\n    state['step']\n"
    inside: dict[str, Any] = {}
    exec(compile(source, "/lightning/checkpoint_connector.py", "exec"), inside)
    with pytest.raises(KeyError) as error:
        inside["restore_loops"]({})
    message = explain(error.value)
    assert message is not None
    assert "does not have the state that this run needs (KeyError: 'step'). Resume" in message
    inside["fail"] = lambda: torch.optim.SGD([torch.ones(1)], 1.0).load_state_dict({"x": 1})
    exec(compile("def restore_it():\n    fail()\n", "/checkpoint_connector.py", "exec"), inside)
    with pytest.raises(KeyError) as error:
        inside["restore_it"]()
    assert "needs (KeyError: 'param_groups')" in str(explain(error.value))
    inside["fail"] = lambda: refuse_other({"a": 1}, {"a": 2}, "It")  # ours say it themselves
    with pytest.raises(ValueError, match="configuration of It") as refused:
        inside["restore_it"]()
    assert "does not have the state" not in str(explain(refused.value))
    exec(compile(source, "/lightning/other.py", "exec"), inside)
    with pytest.raises(KeyError) as error:
        inside["restore_loops"]({})
    assert explain(error.value) is None


# The other commands


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ("fti --model MaskLearning", "`fti` is not a command; .* Did you mean `fit`?", 2),
        ("--foo", "`--foo` is not a command", 2),
        ("fit", "`--model` must be given", 2),
        ("surgery", "required: BASE, PLAN, OUT. See `python -m secateur surgery --help`", 2),
        ("depth BASE OUT --remov 3", "no option `--remov`. Did you mean `--remove`?", 2),
        ("depth BASE OUT --rem 3", "no option `--rem`", 2),
        ("depth /no/such OUT --remove 3", "`BASE` '/no/such' does not exist", 1),
        ("compare BASE --tex a", "no option `--tex`. Did you mean `--text`?", 2),
        ("compare /no/such --text /no/such", "/no/such does not exist", 2),
        ("memory 7B --batch-siz 1", "Did you mean `--batch-size`?", 2),
        ("memory 7B --batch-size one", "invalid int value: 'one'", 2),
        ("memory /no/such", "/no/such does not exist", 1),
        ("gguf /no/such out.gguf", "`FOLDER` '/no/such' does not exist", 1),
        ("gguf BASE /no/such/out.gguf", "there is no folder /no/such", 2),
        ("serve-check /no/such", "`FOLDER` '/no/such' does not exist", 1),
        ("repair /no/such", "`FOLDER` '/no/such' does not exist", 1),
        ("serve-check BASE --at-once 0", "`--at-once` must be 1 or more, got 0", 1),
    ],
)
def test_every_command_tells_mistakes_in_the_same_way(
    arguments: str,
    message: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = told(arguments.split(), monkeypatch, capsys, code)
    assert re.search(message.replace("?", r"\?"), said), said


def test_the_traceback_is_there_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "fti"])
    with pytest.raises(UsageError):
        program.run()


def test_what_is_no_mistake_of_a_user_keeps_its_traceback() -> None:
    assert explain(KeyError("x")) is None
    assert explain(AssertionError()) is None


def test_long_messages_of_libraries_keep_what_failed_and_why() -> None:
    error = OSError("It failed.\n" + "Meanwhile.\n" * 9 + "That is why.")
    error.add_note("The cure.")
    assert explain(error) == "That is why.\nThe cure.\nSECATEUR_DEBUG=1 shows where."
    assert explain(FileNotFoundError(2, "No such file", "a.txt")) == (
        "a.txt: No such file.\nSECATEUR_DEBUG=1 shows where."
    )


def test_a_checkpoint_chooses_no_class(
    line: TrainCLI, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would import the class that it names, and take its settings for ours."""
    code = tmp_path / "planted.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "step=1.ckpt"
    settings = {"_class_path": "planted.Model", "base": "other"}

    def write(file: BinaryIO) -> None:
        torch.save({"hyper_parameters": settings, "state_dict": {}}, file)
        seal(file, 1, 1)

    write_whole(path, write)
    arguments = [*learn_masks(inputs, tmp_path / "run"), f"--ckpt_path={path}"]
    line.parse_arguments(line.parser, arguments)
    line._parse_ckpt_path()
    assert line.config["fit"].model.init_args.base == str(inputs / "base")
    assert not (tmp_path / "ran").exists()
