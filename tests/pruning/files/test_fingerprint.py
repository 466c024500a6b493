from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import xxhash

from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.fingerprint import fingerprint, refuse_changed
from tests.tiny import tiny_folder


def test_by_hand(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "plan.safetensors"):  # the last: no weights
        (tmp_path / name).write_text(name)
    lines = "\n".join(
        f"{name} {xxhash.xxh3_128(name.encode()).hexdigest()}"
        for name in ("config.json", "model.safetensors")
    )
    assert fingerprint(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


def test_it_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first = tiny_folder(tmp_path / "first")
    second = shutil.copytree(first, tmp_path / "second")
    assert fingerprint(first) == fingerprint(str(second))
    (second / "README.md").write_text("a note changes nothing")
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) != fingerprint(tiny_folder(tmp_path / "third", seed=1))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_byte_counts(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path)
    before = fingerprint(folder)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert fingerprint(folder) != before


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_what_is_not_a_model_folder(tmp_path: Path, missing: str) -> None:
    folder = tiny_folder(tmp_path)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match="is not a model folder"):
        fingerprint(folder)
    with pytest.raises(ValueError, match="is not a model folder"):
        fingerprint(tmp_path / "nowhere")


def test_what_was_exported_is_refused_once_it_has_changed(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    refuse_changed(folder, "another one")  # of a folder that nobody has marked
    (folder / "secateur.json").write_text(json.dumps({"fingerprint": fingerprint(folder)}))
    BaseModel(folder).load()
    (folder / "README.md").write_text("a note changes nothing")
    assert BaseModel(folder).fingerprint == fingerprint(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for read in (lambda: BaseModel(folder).load(), lambda: BaseModel(folder).fingerprint):
        with pytest.raises(
            ValueError, match=r"is not as it was exported: .* remove secateur\.json"
        ):
            read()
