"""Whose code a narrow model runs: strangers that of its folder, this package its own."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.families import FAMILIES
from secateur.pruning.modelling import config_class, is_narrow, narrow_type, stock_type
from secateur.pruning.modelling.modeling_secateur_llama import (
    SecateurLlamaConfig,
    SecateurLlamaForCausalLM,
)
from tests.pruning.export.plans import uneven_plan
from tests.stranger import run_as_stranger
from tests.tiny import tiny_family_folder, tiny_folder

MARKER = "\nimport pathlib\npathlib.Path({!r}).touch()\n"


def narrow_folder(folder: Path, family: str = "llama") -> Path:
    base = tiny_family_folder(folder / "base", family)
    prune_checkpoint(base, uneven_plan(base), folder / "small")
    return folder / "small"


def test_a_type_and_that_of_its_narrow_models() -> None:
    assert narrow_type("llama") == narrow_type("secateur_llama") == "secateur_llama"
    assert stock_type("llama") == stock_type("secateur_llama") == "llama"
    assert is_narrow("secateur_llama")
    assert not is_narrow("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_carries_the_code_of_its_own_family(family: str, tmp_path: Path) -> None:
    found = {path.name for path in narrow_folder(tmp_path, family).glob("*.py")}
    shared = {"secateur_sandwich.py"} if family.startswith("gemma") else set()
    assert found == {f"modeling_secateur_{family}.py", "secateur_narrow.py"} | shared


_WITHOUT_THE_OTHERS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        for family in sys.argv[2:]:
            if name.startswith(f"transformers.models.{family}"):
                raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__name__ == "SecateurLlamaForCausalLM"
"""


def test_it_loads_where_no_other_family_can_be_imported(tmp_path: Path) -> None:
    others = ["gemma2", "gemma3", "mistral", "opt", "phi.", "qwen2.", "qwen3."]
    run_as_stranger(_WITHOUT_THE_OTHERS, narrow_folder(tmp_path), *others, folder=tmp_path)


def test_once_a_type_is_known_transformers_takes_our_class(tmp_path: Path) -> None:
    folder, marker = narrow_folder(tmp_path), tmp_path / "ran"
    for path in folder.glob("*.py"):
        path.write_text(path.read_text() + MARKER.format(str(marker)))
    ours = config_class("secateur_llama").auto_classes["AutoModelForCausalLM"]
    for settings in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **settings)
        assert type(model) is ours
    assert not marker.exists()


def test_an_export_of_an_earlier_version_takes_our_class_and_gets_our_code(tmp_path: Path) -> None:
    # It had the code of all families in one file.
    folder, marker = narrow_folder(tmp_path), tmp_path / "ran"
    for path in folder.glob("*.py"):
        path.unlink()
    (folder / "modeling_secateur.py").write_text(MARKER.format(str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        name: f"modeling_secateur.{value.partition('.')[2]}"
        for name, value in config["auto_map"].items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    config_class("secateur_llama")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert not marker.exists()
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert {value.partition(".")[0] for value in saved.values()} == {"modeling_secateur_llama"}
    assert (tmp_path / "again" / "modeling_secateur_llama.py").is_file()
    assert not (tmp_path / "again" / "modeling_secateur.py").exists()


def test_a_folder_that_was_made_in_memory_names_its_code(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "base")
    found = config_class("secateur_llama")
    config = found(
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=6,
        vocab_size=320,
        block_widths=[{"mlp_mid": 5}, {"attn": 0, "mlp_in": 3}],
    )
    with torch.device("cpu"):
        model = found.auto_classes["AutoModelForCausalLM"](config)
    model.save_pretrained(tmp_path / "small")
    saved = json.loads((tmp_path / "small" / "config.json").read_text())
    assert saved["auto_map"] == config.auto_map
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_class_may_be_made_before_its_attributes() -> None:
    """Servers send classes of a folder to other processes; there the attributes follow."""
    before = SecateurLlamaConfig.auto_classes
    made = types.new_class("Sent", SecateurLlamaForCausalLM.__bases__)
    assert not hasattr(made, "model_class")
    assert SecateurLlamaConfig.auto_classes is before
