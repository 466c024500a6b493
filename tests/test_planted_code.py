"""Code in every place of a base, teacher, plan, checkpoint and export: none of it runs."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import program
from secateur.modules.data.text_data import TextData
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.files.checkpoints import latest_checkpoint, seal, write_whole
from secateur.pruning.modelling import code_files
from tests.pruning.export.plans import uneven_plan
from tests.runs import NOISE, call, learn_masks, make_inputs, on_text, with_callbacks

pytestmark = NOISE

FILES = (
    "__init__.py",
    "configuration_planted.py",
    "custom_generate/generate.py",
    "modeling_planted.py",
    "modeling_secateur_llama.py",
    "secateur_narrow.py",
    "tokenization_planted.py",
    "tokenizer.py",
    "tokenizer_extra.py",
)
AUTO = {
    "AutoConfig": "configuration_planted.Planted",
    "AutoModel": "modeling_planted.Planted",
    "AutoModelForCausalLM": "modeling_planted.Planted",
    "AutoTokenizer": ["tokenization_planted.Planted", None],
}


class Payload:
    """What a pickle does when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


def plant(folder: Path, mark: Path) -> Path:
    """Put code wherever a library may look for it; it leaves `mark` behind if it runs."""
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Planted: pass\n"
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "training_args.bin", "vocab.pkl"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(said | {"auto_map": AUTO}))
    said = json.loads((folder / "config.json").read_text())
    kernel = {"attn_implementation": "attacker/kernel"}
    (folder / "config.json").write_text(json.dumps(said | kernel))
    return folder


@pytest.fixture(scope="module")
def mark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mark") / "ran"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, mark: Path) -> Path:
    """A base, a teacher, a plan and an export, all with planted code."""
    folder = make_inputs(tmp_path_factory.mktemp("planted"))
    plant(folder / "base", mark)
    shutil.copytree(folder / "base", folder / "teacher")
    plan = uneven_plan(folder / "base")
    plan.save(folder / "plan")
    (folder / "plan" / "plan.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()")
    prune_checkpoint(folder / "base", plan, folder / "export")
    (folder / "export" / "secateur.json").unlink()  # which tells what has been changed since
    shutil.copytree(folder / "export", folder / "repaired")
    plant(folder / "export", mark)
    plant(folder / "repaired", mark)
    return folder


def train(inputs: Path, root: Path, *more: str, base: str = "base") -> list[str]:
    return [
        "fit",
        "--model=CausalLM",
        f"--model.base={inputs / base}",
        "--model.warmup_steps=0",
        *on_text(inputs, root),
        "--trainer.max_steps=2",
        *more,
    ]


def only_ours(folder: Path) -> None:
    """No code in a folder but, in that of a narrow model, what this version writes."""
    ours = {path.name: path.read_bytes() for path in code_files("secateur_llama")}
    found = {path.name: path.read_bytes() for path in folder.rglob("*.py")}
    assert found in ({}, ours)
    for name in ("config.json", "tokenizer_config.json"):
        said = json.loads((folder / name).read_text())
        assert "planted" not in json.dumps(said.get("auto_map", {}))
        assert "attacker" not in json.dumps(said)


def test_no_run_runs_it(inputs: Path, mark: Path, tmp_path: Path) -> None:
    call(learn_masks(inputs, tmp_path / "masks", 4))
    only_ours(tmp_path / "masks" / "model")
    distil = (f"--model.teacher={inputs / 'teacher'}", "--model.loss.distillation=1.0")
    saved = with_callbacks(["SaveCheckpoint", "ExportModel"])
    call(train(inputs, tmp_path / "trained", *distil, *saved))
    only_ours(tmp_path / "trained" / "model")
    for command in ("validate", "test", "predict"):
        measured = train(inputs, tmp_path / "trained", *distil, *saved, "--ckpt_path=last")
        call([command, *measured[1:]])
    call(train(inputs, tmp_path / "again", *with_callbacks(["ExportModel"]), base="export"))
    only_ours(tmp_path / "again" / "model")
    assert not mark.exists()


def test_no_command_runs_it(
    inputs: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs / "export")  # where Python would look for modules
    (tmp_path / "text.txt").write_text("Cut above a bud, at a slant. " * 40)
    base, export = str(inputs / "base"), str(inputs / "export")
    plan = str(inputs / "plan")
    text = ["--text", str(tmp_path / "text.txt"), "--window-tokens", "16", "--windows", "2"]
    for arguments in (
        ["surgery", base, plan, str(tmp_path / "cut")],
        ["depth", base, str(tmp_path / "shorter"), "--remove", "1"],
        ["depth", export, str(tmp_path / "narrow"), "--remove", "1"],
        ["compare", f"dense={base}", f"pruned={export}", *text, "--device", "cpu"],
        ["gguf", base, str(tmp_path / "model.gguf"), "--type", "f32"],
        ["repair", str(inputs / "repaired")],
        ["memory", base],
    ):
        program.run(arguments)
    for name in ("cut", "shorter", "narrow"):
        only_ours(tmp_path / name)
    assert (tmp_path / "cut" / "tokenizer.json").is_file()
    assert not mark.exists()


def test_a_checkpoint_is_data(
    inputs: Path,
    mark: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the checksum cannot tell: a whole file whose content is a pickle that does something."""
    call(train(inputs, tmp_path, *with_callbacks(["SaveCheckpoint"])))
    path = latest_checkpoint(tmp_path)
    assert path is not None
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] = {"_class_path": "tokenizer.Planted"}
    content["callbacks"]["Planted"] = Payload(mark)

    def write(file: Any) -> None:
        torch.save(content, file)
        seal(file, 9, 2)

    write_whole(path, write)
    arguments = train(inputs, tmp_path, "--trainer.max_steps=4", "--ckpt_path=last")
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit):
        program.run()
    assert "error: " in capsys.readouterr().err
    assert not mark.exists()


CUSTOM = """\
__import__("pathlib").Path({mark!r}).touch()
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    pass
"""


def test_the_code_of_a_tokenizer_runs_only_if_somebody_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    folder, mark = make_inputs(tmp_path), tmp_path / "ran"
    path = folder / "base" / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.Own"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (folder / "base" / "own_tokenizer.py").write_text(CUSTOM.format(mark=str(mark)))

    def data(**settings: bool) -> TextData:
        return TextData(str(folder / "text.json"), tokenizer=str(folder / "base"), **settings)

    with pytest.raises(ValueError, match="runs only if `trust_remote_code` is true: read it first"):
        _ = data().tokenizer
    assert not mark.exists()
    assert type(data(trust_remote_code=True).tokenizer).__name__ == "Own"
    assert mark.exists()
