"""Every command on every public model, made small: what users start from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import program
from secateur.pruning.files.base_model import BaseModel
from tests.public_models import PUBLIC_MODELS, VOCABULARY
from tests.runs import NOISE, call, on_text, with_callbacks, write_text

pytestmark = NOISE

# One of each kind: scaled frequencies, windows with a token too many, half-precision without ids.
FAST = ("Llama-3.2-1B", "Gemma-3-1b", "Phi-1.5")
ALL = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PUBLIC_MODELS
]


@pytest.fixture(scope="module", params=ALL)
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `base`, and text."""
    folder = tmp_path_factory.mktemp("inputs")
    PUBLIC_MODELS[request.param].write(folder / "base")
    write_text(folder / "text.json", documents=20)
    (folder / "text.txt").write_text("Cut above a bud, at a slant, and the rain runs off. " * 12)
    return folder


def fit(inputs: Path, root: Path, module: str, *settings: str) -> None:
    half = BaseModel(inputs / "base").dtype_of() == torch.float16
    if module == "CausalLM" and half:  # which is refused otherwise
        settings = ("--model.dtype=float32", *settings)
    call(
        [
            "fit",
            f"--model={module}",
            f"--model.base={inputs / 'base'}",
            *on_text(inputs, root),
            "--trainer.max_steps=2",
            "--trainer.logger=false",
            "--trainer.limit_val_batches=0",
            *settings,
            *with_callbacks(["ExportModel"]),
        ]
    )


def check(inputs: Path, folder: Path) -> None:
    """A model computes and generates, in the type and under the rules of its base."""
    dense, model = BaseModel(inputs / "base"), BaseModel(folder)
    live: Any = model.load()
    assert live.dtype == dense.dtype_of()
    for name in ("rope_parameters", "eos_token_id", "bos_token_id", "tie_word_embeddings"):
        assert getattr(model.config, name, None) == getattr(dense.config, name, None), name
    ids = torch.tensor([model.tokenizer()("The gardener takes")["input_ids"]])
    made = live.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, ids.shape[1] + 4)
    assert int(made.max()) < VOCABULARY
    own, base = (f / "generation_config.json" for f in (folder, inputs / "base"))
    if base.exists():
        assert json.loads(own.read_text()) == json.loads(base.read_text())


def kept(root: Path) -> float:
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))["models"]
    dense, made = (figures["counts"]["parameters"] for figures in report.values())
    return float(made / dense)


def test_its_masks_are_learned(inputs: Path, tmp_path: Path) -> None:
    masks = ["--model.learning={start: null}", "--model.settle=null"]
    fit(inputs, tmp_path, "MaskLearning", *masks, *with_callbacks(["AnnealSparsity"]))
    check(inputs, tmp_path / "model")
    assert kept(tmp_path) < 1


def test_its_blocks_go(inputs: Path, tmp_path: Path) -> None:
    callback = ["target=Blocks", "target.count=1", "calibration_windows=8"]
    settings = [f"--trainer.callbacks.{setting}" for setting in callback]
    fit(inputs, tmp_path, "CausalLM", "--trainer.callbacks+=PruneBlocks", *settings)
    check(inputs, tmp_path / "model")
    blocks = BaseModel(inputs / "base").config.num_hidden_layers
    assert BaseModel(tmp_path / "model").config.num_hidden_layers == blocks - 1


def test_its_weights_become_zero(inputs: Path, tmp_path: Path) -> None:
    callback = ["pattern=Unstructured", "pattern.sparsity=0.5", "calibration_windows=8"]
    settings = [f"--trainer.callbacks.{setting}" for setting in (*callback, "held_back_windows=4")]
    fit(inputs, tmp_path, "CausalLM", "--trainer.callbacks+=PruneWeights", *settings)
    check(inputs, tmp_path / "model")
    base = BaseModel(tmp_path / "model")
    model: Any = base.load()
    paths = {projection.path for projection in base.family.projections}
    zeros = [
        float((weight == 0).float().mean())
        for name, weight in model.named_parameters()
        if name.endswith(".weight") and any(name.endswith(f".{path}.weight") for path in paths)
    ]
    assert zeros == pytest.approx([0.5] * len(zeros), abs=0.05)


def test_commands_take_it(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, figures = tmp_path / "short", tmp_path / "figures.json"
    program.run(["depth", str(inputs / "base"), str(short), "--remove", "1"])
    check(inputs, short)
    text = ["--text", f"t={inputs / 'text.txt'}", "--window-tokens", "16", "--device", "cpu"]
    folders = [f"dense={inputs / 'base'}", f"short={short}"]
    program.run(["compare", *folders, *text, "--json", str(figures)])
    assert "short" in capsys.readouterr().out
    models = json.loads(figures.read_text())["models"]
    perplexities = [row["perplexity"]["t"]["value"] for row in models.values()]
    assert all(1 < value < math.inf for value in perplexities)
    assert len(set(perplexities)) == 2
