"""What every exported folder has beside weights, whatever way it was written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.pruning.export.deliver import deliver
from secateur.pruning.export.ranks import OneRank
from secateur.pruning.export.rewrite import prune_blocks, prune_checkpoint
from secateur.pruning.export.sources import FromModel
from secateur.pruning.export.stages import Origin
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.finish import for_older_readers
from tests.pruning.export.plans import uneven_plan, uniform_plan
from tests.stranger import run_as_stranger
from tests.tiny import tiny_config, tiny_folder, tiny_tokenizer

COMPANIONS = {
    "LICENSE": "as you like",
    "NOTICE.txt": "by me",
    "USE_POLICY.md": "be kind",
    "chat_template.jinja": "{{ messages }}",
    "merges.txt": "a b",
    "tokenizer.model": "pieces",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_folder(tmp_path_factory.mktemp("finish") / "base", rope_parameters=ROPE["plain"])
    for name, text in COMPANIONS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    return folder


def trained(base: Path, folder: Path) -> None:
    found = BaseModel(base)
    model = found.load()
    what = FromModel(model, tiny_tokenizer(), torch.bfloat16, found.load())
    origin = Origin(str(base), base, found.fingerprint, steps=1)
    windows_NT = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    deliver(what, origin, folder, windows_NT, OneRank(base, torch.device("cpu")), measured=False)


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "widths": lambda base, folder: prune_checkpoint(base, uneven_plan(base), folder),
    "one width": lambda base, folder: prune_checkpoint(base, uniform_plan(base), folder),
    "blocks": lambda base, folder: prune_blocks(base, folder, remove=[1]),
    "trained": trained,
}
ROPE: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 1e6},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_out_leaves_the_same_beside_the_weights(
    way: str, base: Path, tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        WAYS[way](base, tmp_path / "small")
    finally:
        os.umask(before)
    for name, text in COMPANIONS.items():
        assert (tmp_path / "small" / name).read_text() == text
    for path in (tmp_path / "small").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    said = json.loads((tmp_path / "small" / "config.json").read_text())
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 1e6
    assert said["torch_dtype"] == said["dtype"]
    assert BaseModel(tmp_path / "small").config.rope_parameters == ROPE["plain"]


@pytest.mark.parametrize("name", ROPE)
def test_older_readers_find_the_same_rotations(name: str) -> None:
    """Fields of version 4 alone make the same configuration, and so do both."""
    made = tiny_config("llama", rope_parameters=dict(ROPE[name])).to_dict()
    older = for_older_readers(made)
    without = {key: value for key, value in made.items() if key != "rope_parameters"}
    for fields in (without | older, made | older):
        kind = fields["model_type"]
        rest = {key: value for key, value in fields.items() if key != "model_type"}
        assert tiny_config(kind, **rest).rope_parameters == ROPE[name]


def test_older_readers_find_both_tables_of_gemma3() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    older = for_older_readers(tiny_config("gemma3_text", rope_parameters=rope).to_dict())
    assert older["rope_theta"] == 1e6
    assert older["rope_local_base_freq"] == 1e4
    assert older["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_older_readers_find_how_much_of_a_head_turns() -> None:
    older = for_older_readers(tiny_config("phi").to_dict())
    assert older["partial_rotary_factor"] == 0.5
    assert "rope_theta" not in for_older_readers(tiny_config("opt").to_dict())


def test_a_base_without_a_tokenizer_is_cut_all_the_same(base: Path, tmp_path: Path) -> None:
    for path in tiny_folder(tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    prune_checkpoint(tmp_path / "base", uneven_plan(tmp_path / "base"), tmp_path / "small")
    assert BaseModel(tmp_path / "small").load().num_parameters() > 0
    with pytest.raises(ValueError, match="holds no tokenizer"):
        BaseModel(tmp_path / "small").tokenizer()


def test_links_inside_a_folder_are_copied_as_files(base: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    (folder / "LICENSE").write_text("as you like")
    (folder / "LICENSE.txt").symlink_to("LICENSE")
    prune_checkpoint(folder, uneven_plan(folder), tmp_path / "small")
    assert not (tmp_path / "small" / "LICENSE.txt").is_symlink()
    assert (tmp_path / "small" / "LICENSE.txt").read_text() == "as you like"


_TOKENIZE = """
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
assert tokenizer("Cut above a bud").input_ids[0] == 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "TokenizersBackend", None])
def test_the_tokenizer_of_a_narrow_model_needs_no_code(
    kind: str | None, base: Path, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "base")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind}))
    prune_checkpoint(folder, uneven_plan(folder), tmp_path / "small")
    run_as_stranger(_TOKENIZE, tmp_path / "small", folder=tmp_path)
