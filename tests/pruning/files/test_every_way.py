"""A base that is not what it says is refused in the same words, whoever reads it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from secateur import program
from secateur.modules import CausalLM, ShardedDDP, Zero
from secateur.pruning.blocks.source import StreamedBlocks
from secateur.pruning.export.gguf_file import write_gguf
from secateur.pruning.export.rewrite import prune_blocks, prune_checkpoint
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure.compare import compare_folders
from tests.pruning.export.plans import uneven_plan
from tests.runs import NOISE, learn_masks, make_inputs, on_text, write_text
from tests.tiny import tiny_folder

pytestmark = NOISE

Q = "model.layers.1.self_attn.q_proj.weight"
SAID = f"lacks 1 tensors of a 'llama' causal language model, '{Q}' first"

WAYS: dict[str, Callable[[Path, Path], object]] = {
    "stock": lambda base, out: BaseModel(base).load(),
    "ZeRO-3": lambda base, out: Zero(stage=3).read_model(BaseModel(base), "auto"),
    "ZeRO-2": lambda base, out: Zero(stage=2).read_model(BaseModel(base), "auto"),
    "FSDP2": lambda base, out: ShardedDDP().read_model(BaseModel(base), "auto"),
    "blocks": lambda base, out: StreamedBlocks(base),
    "surgery": lambda base, out: prune_checkpoint(base, uneven_plan(base), out),
    "depth": lambda base, out: prune_blocks(base, out, remove=[0]),
    "gguf": lambda base, out: write_gguf(base, out),
    "compare": lambda base, out: compare_folders(
        {"dense": base}, {"text": write_text(out.with_suffix(".txt"))}, window_tokens=16
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right model, and one without the queries of a block."""
    folder = make_inputs(tmp_path_factory.mktemp("ways"))
    weights = tiny_folder(folder / "wrong") / "model.safetensors"
    tensors = load_file(weights)
    del tensors[Q]
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_reading_refuses_it(way: str, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=SAID):
        WAYS[way](inputs / "wrong", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def runs(inputs: Path, root: Path) -> dict[str, list[str]]:
    train = ["fit", "--model=CausalLM", *on_text(inputs, root), "--trainer.max_steps=2"]
    wrong, right = inputs / "wrong", inputs / "base"
    masks = [a for a in learn_masks(inputs, root, 4) if not a.startswith("--model.base=")]
    teacher = ["--model.loss.distillation=1.0", f"--model.teacher={wrong}"]
    return {
        "training": [*train, f"--model.base={wrong}"],
        "teacher": [*train, f"--model.base={right}", *teacher],
        "masks": [*masks, f"--model.base={wrong}"],
        "validate": ["validate", *masks[1:], f"--model.base={wrong}"],
    }


@pytest.mark.parametrize("name", ["training", "teacher", "masks", "validate"])
def test_every_run_refuses_it_before_text_is_tokenised(
    name: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = runs(inputs, tmp_path / "run")[name]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as end:
        program.run()
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert SAID in said
    assert "Traceback" not in said
    assert len(said.split("error: ")[1].splitlines()) <= 3
    assert not (inputs / "cache").exists()


def test_a_quantised_base_is_not_trained(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="stored quantised, and packed numbers can be neither"):
        CausalLM(base=str(folder)).check_bases()
