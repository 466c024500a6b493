from __future__ import annotations

import csv
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import docstring_parser
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from secateur import callbacks, modules
from secateur.pruning import schedules
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure.sizes import count
from secateur.pruning.plan import Plan
from secateur.pruning.widths import (
    budget,
    gate_gradient,
    gates,
    gradual_ranking,
    hypernetwork,
    width_magnitude,
)
from tests.runs import (
    NOISE,
    QUICK,
    call,
    content,
    learn_masks,
    make_inputs,
    on_text,
    with_callbacks,
    write_text,
)
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = NOISE
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def fitted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished run; tests leave it as it is."""
    root = tmp_path_factory.mktemp("fitted")
    call(learn_masks(inputs, root))
    return root


def read_metrics(root: Path, version: int = 0) -> list[dict[str, str]]:
    with (root / "metrics" / f"version_{version}" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# What fit leaves behind


def test_fit_leaves_plan_model_report_plots_metrics_and_checkpoints(fitted: Path) -> None:
    for name in (
        "plan/plan.json",
        "plan/plan.safetensors",
        "model/model.safetensors",
        "model/config.json",
        "model/generation_config.json",
        "model/tokenizer.json",
        "model/README.md",
        "report.json",
        "report.md",
        "report.html",
        "plots/widths.png",
        "metrics/version_0/metrics.csv",
        "metrics/version_0/config.yaml",
        "checkpoints/step=8.ckpt",
    ):
        assert (fitted / name).is_file(), name
    assert list((fitted / "logs").rglob("events.out.tfevents.*"))


def test_the_exported_model_is_exactly_on_budget_by_an_independent_count(
    inputs: Path, fitted: Path
) -> None:
    dense = count(BaseModel(inputs / "base").load())
    pruned = count(AutoModelForCausalLM.from_pretrained(fitted / "model", trust_remote_code=True))
    kept = pruned.block_flops_per_token / dense.block_flops_per_token
    # A unit of the finest site costs at most 3 projections of 37 columns, 2 FLOPs a weight.
    one_unit = 2 * 3 * 37 / dense.block_flops_per_token
    assert 0.5 - one_unit < kept <= 0.5
    assert Plan.load(fitted / "plan").provenance["kept"] == pytest.approx(kept)


def test_the_card_has_budget_quality_command_versions_and_fingerprint(fitted: Path) -> None:
    card = (fitted / "model" / "README.md").read_text(encoding="utf-8")
    plan = Plan.load(fitted / "plan")
    report = json.loads((fitted / "report.json").read_text(encoding="utf-8"))
    quality = report["models"]["pruned"]["perplexity"]["validation"]["value"]
    for fact in ("block flops", f"{quality:.3f}", plan.base, f"- torch: {torch.__version__}"):
        assert fact in card
    assert "python " in card
    assert "ms" not in card.replace("torch_dtype", "").split("## Quality")[1].split("## Widths")[0]


def test_the_metrics_are_those_of_the_callbacks(fitted: Path) -> None:
    logged = {key for row in read_metrics(fitted) for key, value in row.items() if value}
    assert {"train_loss", "kept", "target", "penalty", "budget/expected", "budget/hard"} <= logged
    assert {"budget/undecided", "widths/attn_in", "widths/mlp_mid"} <= logged


# The other subcommands


@pytest.mark.parametrize("name", ["validate", "test"])
def test_validate_and_test_measure_the_plan_of_the_last_checkpoint(
    name: str, inputs: Path, fitted: Path
) -> None:
    line = call(
        [
            name,
            "--model=MaskLearning",
            f"--model.base={inputs / 'base'}",
            *QUICK,
            *on_text(inputs, fitted),
            *with_callbacks(["AnnealSparsity"]),
            "--ckpt_path=last",
            "--trainer.logger=false",
        ]
    )
    report = json.loads((fitted / "report.json").read_text(encoding="utf-8"))
    exported = report["models"]["pruned"]["perplexity"]["validation"]["value"]
    key = {"validate": "val_perplexity", "test": "test_perplexity"}[name]
    assert float(line.trainer.callback_metrics[key]) == pytest.approx(exported, rel=1e-5)


def test_predict_writes_the_loss_of_every_window(
    inputs: Path, fitted: Path, tmp_path: Path
) -> None:
    call(
        [
            "predict",
            "--model=MaskLearning",
            f"--model.base={inputs / 'base'}",
            *QUICK,
            *on_text(inputs, tmp_path),
            *with_callbacks(["AnnealSparsity"]),
            f"--ckpt_path={fitted / 'checkpoints' / 'step=8.ckpt'}",
        ]
    )
    with (tmp_path / "predictions_0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["window"]) for row in rows] == list(range(6))
    report = json.loads((fitted / "report.json").read_text(encoding="utf-8"))
    mean = sum(float(row["nll"]) for row in rows) / 6
    measured = report["models"]["pruned"]["perplexity"]["validation"]["mean_nll"]
    assert mean == pytest.approx(measured, rel=1e-5)


def test_print_config_shows_every_setting_and_runs_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        call([*learn_masks(inputs, tmp_path / "run"), "--print_config"])
    assert stop.value.code == 0
    assert "class_path: secateur.MaskLearning" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# Help that reads like a manual

PUBLIC = [
    *(getattr(package, name) for package in (modules, callbacks) for name in package.__all__),
    *(
        member
        for module in (
            budget,
            gates,
            hypernetwork,
            schedules,
            gate_gradient,
            gradual_ranking,
            width_magnitude,
        )
        for name, member in vars(module).items()
        if inspect.isclass(member) and member.__module__ == module.__name__ and name[0] != "_"
        if not inspect.isabstract(member) and "__init__" in vars(member)
    ),
]


@pytest.mark.parametrize("public", PUBLIC, ids=lambda c: c.__name__)
def test_every_argument_of_a_public_class_is_documented(public: type) -> None:
    documented = {p.arg_name for p in docstring_parser.parse(inspect.getdoc(public) or "").params}
    assert documented == set(inspect.signature(public).parameters)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit", "--model.help=MaskLearning"], ["in (0, 1]", "Initial gates"]),
        (["fit", "--model.help=CausalLM"], ["Steps over which the learning rate rises"]),
        (["fit", "--data.help=TextData"], ["2 or more, at most the positions of the model"]),
        (
            ["fit", "--trainer.callbacks.help=AnnealSparsity"],
            ["Fraction of the steps that learn masks", "in [0, 1]"],
        ),
        (["fit", "--trainer.callbacks.help=SaveCheckpoint"], ["Optimiser steps between two"]),
    ],
)
def test_help_tells_units_and_ranges(
    arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(arguments)
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in expected:
        assert text in said


# Bad input, told before anything is trained


def refuses(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(arguments)


def test_optimisers_are_those_of_the_modules() -> None:
    refuses(["fit", "--optimizer=torch.optim.SGD"], "`--optimizer` is not a setting")


def test_predictions_are_not_thrown_away(inputs: Path, tmp_path: Path) -> None:
    arguments = ["--model=MaskLearning", f"--model.base={inputs / 'base'}"]
    refuses(
        ["predict", *arguments, *on_text(inputs, tmp_path), "--return_predictions=false"],
        "`--return_predictions` must be true",
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--model.budget.keep=1.5", r"`--model.budget.keep` must be in \(0, 1\], got 1.5"),
        ("--model.budget.keep=0", r"`--model.budget.keep` must be in \(0, 1\], got 0"),
        ("--model.budget.min_width=20", "cannot be reached: with `--model.budget.min_width` 20"),
        ("--model.budget.width_multiple=25", "width_multiple` 25 is larger than site 0.attn_in"),
        ("--model.base=/no/such/folder", "`--model.base` '/no/such/folder' does not exist"),
        ("--data.window_tokens=65", "`--data.window_tokens` 65 is longer than the 64 positions"),
        ("--trainer.max_steps=-1", "`--trainer.max_steps` must be set"),
        (
            "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
            "has ModelCheckpoint, .* Use SaveCheckpoint: .*keep_best and",
        ),
        ("--ckpt_path=best", "`--ckpt_path` is best, but .*/run/checkpoints names none"),
        ("--data.train=/no/such/text.json", "`--data.train`: there is no file /no/such/text.json"),
    ],
)
def test_a_bad_setting_is_named_with_its_cure(
    setting: str, message: str, inputs: Path, tmp_path: Path
) -> None:
    refuses([*learn_masks(inputs, tmp_path / "run"), setting], message)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_unknown_family_is_refused_with_the_known_ones(inputs: Path, tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GPTNeoXConfig(vocab_size=320, intermediate_size=16, **sizes)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    tiny_tokenizer().save_pretrained(tmp_path / "neox")
    setting = f"--model.base={tmp_path / 'neox'}"
    refuses(
        [*learn_masks(inputs, tmp_path / "run"), setting],
        "`model_type` 'gpt_neox' is not a known family; known are .*llama",
    )


def test_a_base_that_is_no_model_is_refused(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    setting = f"--model.base={tmp_path / 'empty'}"
    refuses([*learn_masks(inputs, tmp_path / "run"), setting], "is not a model folder")
    (tmp_path / "empty" / "config.json").write_text("{}")
    refuses([*learn_masks(inputs, tmp_path / "run"), setting], r"holds no \*.safetensors file")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "holds no text"),
        (["Cut."], "less than one window of `--data.window_tokens` 16"),
        ([{"words": "Cut."}], "entry 0 has no 'text'; set `--data.text_field` to one of 'words'"),
        ([3], "entry 0 holds int, not text"),
    ],
)
def test_text_that_cannot_be_trained_on_is_refused(
    texts: list[object], message: str, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(texts))
    arguments = [*learn_masks(inputs, tmp_path / "run"), f"--data.train={tmp_path / 'bad.json'}"]
    refuses(arguments, message)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    make_inputs(tmp_path, vocab_size=300)
    refuses(
        learn_masks(tmp_path, tmp_path / "run"), "`--data.tokenizer` makes of the text the id 319"
    )


@pytest.mark.parametrize("name", ["model", "plan"])
def test_a_foreign_folder_is_refused_before_training(
    name: str, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("all of it")
    refuses(learn_masks(inputs, tmp_path), f"{name} exists and is not what Secateur writes")
    assert (tmp_path / name / "thesis.txt").read_text() == "all of it"
    assert not (tmp_path / "checkpoints").exists()


def test_a_folder_with_a_plan_and_more_is_foreign(
    inputs: Path, fitted: Path, tmp_path: Path
) -> None:
    shutil.copytree(fitted / "plan", tmp_path / "plan")
    (tmp_path / "plan" / "thesis.txt").touch()
    refuses(learn_masks(inputs, tmp_path), "plan exists and is not what Secateur writes")


def test_the_base_model_is_not_written_over(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "base", tmp_path / "model")
    arguments = [*learn_masks(inputs, tmp_path), f"--model.base={tmp_path / 'model'}"]
    refuses(arguments, "model is the base model itself; choose another folder")


def test_a_foreign_folder_is_refused_before_any_text_is_read(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "thesis.txt").touch()
    refuses(learn_masks(tmp_path, tmp_path / "run"), "model exists and is not what Secateur writes")
    assert not (tmp_path / "cache").exists()


# Failure at the end, and after it


def test_a_full_disk_leaves_nothing_half_written_and_the_export_can_be_repeated(
    inputs: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(model: object, folder: Path, **settings: object) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half of the weights")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", fill_the_disk)
        with pytest.raises(OSError, match="No space left") as failure:
            call(learn_masks(inputs, tmp_path))
    assert "repeat the export without training" in failure.value.__notes__[0]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", "checkpoints", "logs", "metrics", "plots"}
    line = call([*learn_masks(inputs, tmp_path), "--ckpt_path=last"])
    assert line.trainer.fit_loop.epoch_loop.batch_progress.current.ready == 8  # none was added
    assert content(tmp_path / "plan") == content(fitted / "plan")
    assert content(tmp_path / "model").keys() == content(fitted / "model").keys()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (fitted / "model" / name).read_bytes()


# Resuming from what does not fit


@pytest.fixture
def started(fitted: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoints of the finished run, to be harmed."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for step in (6, 8):
        path = folder / f"step={step}.ckpt"
        path.write_bytes((fitted / "checkpoints" / path.name).read_bytes())
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_checkpoint_is_named_with_the_good_one(inputs: Path, started: Path) -> None:
    truncate(started / "step=8.ckpt")
    refuses(
        [*learn_masks(inputs, started.parent), f"--ckpt_path={started / 'step=8.ckpt'}"],
        r"step=8.ckpt is damaged \(truncated\?\), or .*; resume from .*step=6.ckpt",
    )


def test_last_goes_past_a_truncated_checkpoint(inputs: Path, fitted: Path, started: Path) -> None:
    truncate(started / "step=8.ckpt")
    with pytest.warns(UserWarning, match="step=8.ckpt is damaged"):
        call([*learn_masks(inputs, started.parent), "--ckpt_path=last"])
    assert content(started.parent / "plan") == content(fitted / "plan")


def test_last_without_checkpoints_starts_a_fit_says_so_and_starts_nothing_else(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does a run without SaveCheckpoint leave a checkpoint of another kind."""
    with caplog.at_level(logging.INFO):
        line = call([*learn_masks(inputs, tmp_path, 1, callbacks=()), "--ckpt_path=last"])
    assert f"No checkpoint in {tmp_path}/checkpoints: starting at step 0." in caplog.text
    assert line.trainer.global_step == 1
    assert not list(tmp_path.rglob("*.ckpt"))
    empty = tmp_path / "empty"
    arguments = ["--model=MaskLearning", f"--model.base={inputs / 'base'}"]
    refuses(["validate", *arguments, *on_text(inputs, empty), "--ckpt_path=last"], "has none; fit")


def test_another_base_model_is_refused(inputs: Path, started: Path, tmp_path: Path) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    setting = f"--model.base={tmp_path / 'other'}"
    refuses(
        [*learn_masks(inputs, started.parent), setting, "--ckpt_path=last"],
        "another configuration of MaskLearning: `--model.base` was",
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--model.budget.keep=0.6", "MaskLearning: `--model.budget` was .*keep=0.5.*keep=0.6"),
        ("--model.learning.pressure.temperature=9", "MaskLearning: `--model.learning` was"),
        ("--model.sampler.seed=1", "MaskLearning: `--model.sampler` was"),
        ("--model.optimizer.lr=0.5", "MaskLearning: `--model.optimizer` was .* is now .*'lr': 0.5"),
        ("--trainer.accumulate_grad_batches=4", "MaskLearning: `windows_per_step` was"),
        ("--trainer.gradient_clip_val=0.1", "MaskLearning: `gradient_clip` was"),
        ("--trainer.max_steps=9", "MaskLearning: `--trainer.max_steps` was 8 and is now 9"),
        ("--data.window_tokens=12", "TextData: `fingerprint` was"),
    ],
)
def test_another_configuration_is_refused(
    setting: str, message: str, inputs: Path, started: Path
) -> None:
    made_by = {"sampler": "GateSampler", "optimizer": "torch.optim.AdamW"}
    first = [f"--model.{name}={c}" for name, c in made_by.items() if f"model.{name}" in setting]
    # From step 6: a run that is complete goes straight to its export.
    path = f"--ckpt_path={started / 'step=6.ckpt'}"
    refuses([*learn_masks(inputs, started.parent), *first, setting, path], message)


def test_a_resumed_run_may_end_sooner_and_says_so(
    inputs: Path, started: Path, tmp_path: Path
) -> None:
    """From step 6 of 8 on only one more step is taken."""
    arguments = learn_masks(inputs, tmp_path / "run", max_steps=7)
    with pytest.warns(UserWarning, match="max_steps` was 8 and is 7 from step 6 on"):
        call([*arguments, f"--ckpt_path={started / 'step=6.ckpt'}"])
    shortened = [{"at_step": 6, "max_steps_before": 8, "max_steps": 7}]
    assert Plan.load(tmp_path / "run" / "plan").provenance["shortened"] == shortened
    card = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert '"max_steps_before": 8' in card
    last = torch.load(tmp_path / "run" / "checkpoints" / "step=7.ckpt", weights_only=True)
    assert last["shortened"] == shortened
    assert bool(last["state_dict"]["settled_N"].any())


def test_other_data_are_refused(inputs: Path, started: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "other.json", seed=1)
    refuses(
        [
            *learn_masks(inputs, started.parent),
            f"--data.train={tmp_path / 'other.json'}",
            "--ckpt_path=last",
        ],
        "TextData: `fingerprint` was",
    )


# The command line itself


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_a_newcomer_sees_one_line_and_a_developer_the_traceback(
    inputs: Path, tmp_path: Path
) -> None:
    arguments = [*learn_masks(inputs, tmp_path), "--model.budget.keep=1.5"]
    plain = run(arguments)
    assert plain.returncode == 1
    assert "error: `--model.budget.keep` must be in (0, 1], got 1.5." in plain.stderr
    assert "Traceback" not in plain.stderr
    assert "Traceback" in run(arguments, SECATEUR_DEBUG="1").stderr


def test_training_from_scratch_is_quiet_and_leaves_a_stock_model(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    architecture = {"model_type": "llama", "vocab_size": 320, "hidden_size": 16}
    architecture |= {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    done = run(
        [
            "fit",
            "--model=CausalLM",
            f"--model.architecture={json.dumps(architecture)}",
            "--model.warmup_steps=1",
            *on_text(tmp_path, tmp_path / "run"),
            f"--data.tokenizer={tmp_path / 'base'}",
            "--trainer.max_steps=2",
            *with_callbacks(["SaveCheckpoint", "ExportModel"]),
        ]
    )
    assert done.returncode == 0, done.stderr
    for noise in ("gemm_4bit", "LeafSpec", "Tip:", "many workers", "Setting accelerator"):
        assert noise not in done.stdout + done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert type(model) is LlamaForCausalLM
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert bool(logits.isfinite().all())
