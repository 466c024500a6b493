from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.files import base_model
from secateur.pruning.files.base_model import BaseModel, load_tokenizer, read_config
from secateur.pruning.files.fingerprint import fingerprint
from tests.pruning.export.plans import uneven_plan
from tests.tiny import tiny_folder, tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "base")


def test_a_folder_is_itself_and_is_read_as_it_was_written(base: Path) -> None:
    for found in (BaseModel(str(base)), BaseModel(base)):
        assert found.folder == base
        model, original = found.load(), tiny_llama()
        for name, tensor in original.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert found.config.model_type == found.family.model_type == "llama"
        assert found.settings["model_type"] == read_config(base).model_type == "llama"
        assert found.tensors.keys() == original.state_dict().keys()
        assert found.fingerprint == fingerprint(base)
        assert found.tokenizer()("Cut above a bud")["input_ids"][0] == 1


def test_everything_is_found_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = BaseModel(base)
    for name in ("config", "family", "fingerprint", "folder", "settings", "tensors"):
        assert getattr(found, name) is getattr(found, name)
    found.load("bfloat16")
    found.skeleton()
    assert found.config.dtype == torch.float32  # nobody writes into it


def test_the_dtype_is_that_of_the_file_unless_another_is_asked_for(
    base: Path, tmp_path: Path
) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    assert BaseModel(tmp_path).load().dtype == torch.bfloat16
    assert BaseModel(base).load("bfloat16").dtype == torch.bfloat16
    assert BaseModel(base).load().dtype == torch.float32


def test_the_type_that_a_name_stands_for(base: Path, tmp_path: Path) -> None:
    assert BaseModel(base).dtype_of() == torch.float32
    assert BaseModel(base).dtype_of("bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="`dtype` must be auto or float64 or .*, got 'big'"):
        BaseModel(base).dtype_of("big")
    tiny_llama().half().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": None}))
    assert BaseModel(tmp_path).dtype_of() == torch.float16


def test_an_invalid_model_folder_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`base` '/no/such' does not exist; check the path"):
        BaseModel("/no/such").check()
    with pytest.raises(ValueError, match="`teacher` 'no/such' does not exist.*`hf download`"):
        BaseModel(Path("no/such"), "teacher").check()
    with pytest.raises(ValueError, match="is not a model folder: it has no config.json"):
        BaseModel(str(tmp_path)).check()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no \*.safetensors file; save the model with"):
        assert BaseModel(str(tmp_path)).folder
    BaseModel("somebody/model").check()  # may be on the hub: `folder` will see


def test_a_name_that_the_hub_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="`base` 'not a name' is neither a folder nor a model"):
        assert BaseModel("not a name").folder


def test_damaged_folders_are_refused_with_the_cause(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="has no readable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "elm"}))
    with pytest.raises(ValueError, match="has no readable config.json.*elm"):
        assert BaseModel(tmp_path).config
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "secateur_elm"}))
    with pytest.raises(ValueError, match="'secateur_elm' is not a known family; known are gemma2"):
        assert BaseModel(tmp_path).config


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    weights = tiny_folder(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match="model.safetensors is damaged: .*; fetch or save it again"
    ):
        BaseModel(tmp_path).load()


def test_missing_weights_are_refused_and_not_drawn_at_random(tmp_path: Path) -> None:
    weights = tiny_folder(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors.*'model.layers.1.mlp.up_proj.weight'"):
        BaseModel(tmp_path).load()


def test_a_narrow_model_is_read_by_our_code_and_not_by_that_in_its_folder(
    base: Path, tmp_path: Path
) -> None:
    prune_checkpoint(base, uneven_plan(base), tmp_path / "small")
    for path in (tmp_path / "small").glob("*.py"):
        path.write_text("raise RuntimeError('this is not to be run')")
    found = BaseModel(tmp_path / "small")
    assert found.family.narrow
    model = found.load()
    assert type(model).__module__ == "secateur.pruning.modelling.modeling_secateur_llama"
    assert type(found.skeleton()) is type(model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: t.shape for name, t in found.skeleton().state_dict().items()} == shapes
    assert model.state_dict().keys() == found.tensors.keys()
    tiny_folder(tmp_path / "named")
    assert load_tokenizer(tmp_path / "named")("Cut")["input_ids"][0] == 1


def test_what_is_fetched_of_the_hub_is_all_that_an_export_copies(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(base)

    monkeypatch.setattr(base_model, "snapshot_download", fetch)
    assert BaseModel("somebody/model").folder == base
    for name in (
        "config.json", "generation_config.json", "model.safetensors", "merges.txt", "LICENSE",
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
        "added_tokens.json", "chat_template.jinja", "chat_template.json", "NOTICE", "LICENSE.txt",
        "additional_chat_templates/tool_use.jinja", "USE_POLICY.md", "spiece.model",
    ):  # fmt: skip
        assert any(fnmatch(name, pattern) for pattern in asked), name
    for name in ("modeling_x.py", "pytorch_model.bin", "training_args.bin", "original/params.json"):
        assert not any(fnmatch(name, pattern) for pattern in asked), name
