from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from secateur.modules.loading import check_base, load_config, load_model, load_tokenizer, resolve
from tests.tiny import tiny_folder, tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "base")


def test_a_folder_is_itself_and_is_read_as_it_was_written(base: Path) -> None:
    assert resolve(str(base)) == base
    model, original = load_model(base), tiny_llama()
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert load_config(base).model_type == "llama"
    assert load_tokenizer(base)("Cut above a bud")["input_ids"][0] == 1


def test_the_dtype_is_that_of_the_file_unless_another_is_asked_for(
    base: Path, tmp_path: Path
) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert load_model(base, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(base).dtype == torch.float32


def test_what_is_no_model_folder_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`base` '/no/such' does not exist; check the path"):
        check_base("/no/such")
    with pytest.raises(ValueError, match="is not a model folder: it has no config.json"):
        check_base(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no \*.safetensors file; save the model with"):
        resolve(str(tmp_path))
    check_base("somebody/model")  # may be on the hub: `resolve` will see


def test_a_name_that_the_hub_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="`base` 'not a name' is neither a folder nor a model"):
        resolve("not a name")


def test_damaged_folders_are_refused_with_the_cause(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="has no readable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "elm"}))
    with pytest.raises(ValueError, match="has no readable config.json.*elm"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match="cannot be read as a causal language model"):
        load_model(tmp_path)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a causal language model"):
        load_model(tmp_path)
