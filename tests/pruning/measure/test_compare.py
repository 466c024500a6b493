from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.measure.compare import main
from secateur.pruning.measure.perplexity import cut_windows, perplexity
from tests.pruning.export.plans import uneven_plan
from tests.tiny import SENTENCES, tiny_folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    base = tiny_folder(folder / "base")
    prune_checkpoint(base, uneven_plan(base), folder / "small")
    (folder / "text.txt").write_text(" ".join(SENTENCES * 20), encoding="utf-8")
    item = {"ctx": SENTENCES[0], "endings": SENTENCES[1:3], "label": 1}
    (folder / "task.jsonl").write_text(f"{json.dumps(item)}\n" * 3, encoding="utf-8")
    return folder


def test_folders_side_by_side(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            *(f"dense={inputs / 'base'}", str(inputs / "small")),
            *("--text", f"own={inputs / 'text.txt'}", "--task", str(inputs / "task.jsonl")),
            *("--window-tokens", "16", "--windows", "5", "--device", "cpu"),
            *("--json", str(inputs / "figures.json"), "--html", str(inputs / "page.html")),
        ]
    )
    found = json.loads((inputs / "figures.json").read_text())["models"]
    assert list(found) == ["dense", "small"]
    ids = AutoTokenizer.from_pretrained(inputs / "base")((inputs / "text.txt").read_text())
    model = AutoModelForCausalLM.from_pretrained(inputs / "small", trust_remote_code=True)
    expected = perplexity(model, cut_windows(torch.tensor(ids["input_ids"]), 16)[:5])
    assert found["small"]["perplexity"]["own"]["value"] == pytest.approx(expected.value)
    assert found["small"]["zero_shot"]["task"]["num_questions"] == 3
    assert found["small"]["kept_block_parameters"] < 1
    assert len(found["small"]["generation"]["answers"]) == 4
    assert "small beside dense" in (inputs / "page.html").read_text(encoding="utf-8")
    assert "accuracy task" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window-tokens", "100000"], "less than one window"),
        (["--windows", "0"], "`--windows` must be 1 or more, got 0"),
        (["--window-tokens", "1"], "`--window-tokens` must be 2 or more, got 1"),
        (["--dtype", "int8"], "`--dtype` must be auto or float64"),
        (["--device", "meta"], "'meta' is not a device here"),
        (["--json", "base"], "--json: base is a folder; name a file"),
        (["--text", "base/model.safetensors"], "`--text` .* is not UTF-8 text .*; convert it"),
        (["--text", "base"], "`--text` base holds no files"),
        (["--task", "text.txt"], "is not a question"),
        (["--task", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--text", "a=text.txt", "a=text.txt"], "two text are called a"),
        (["--dtype", "bf16"], "'bf16' is not a torch type, such as bfloat16"),
        (["--device", "gpu"], "'gpu' is not a device here"),
        (["--json", "no/such/report.json"], "there is no folder .*no/such"),
        (["--html", "no/such/page.html"], "--html.* there is no folder .*no/such"),
    ],
)
def test_bad_input(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(inputs)
    with pytest.raises(ValueError, match=message):
        main(["base", "--text", "text.txt", *arguments])
