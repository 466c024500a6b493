from __future__ import annotations

from pathlib import Path

import pytest

from secateur.pruning.files.headers import INDEX, weight_files
from secateur.pruning.files.model_folder import read_json

DAMAGED = {
    "cut off": b'{"weight_map": {"a": "b',
    "no text": b"\xc0\x00",
    "no object": b"[1]",
}
WITHOUT_FILES = {
    "no map": b"{}",
    "a list": b'{"weight_map": ["a"]}',
    "a number": b'{"weight_map": {"a": 1}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / INDEX
    path.write_bytes(content)
    for read in (lambda: read_json(path), lambda: weight_files(tmp_path)):
        with pytest.raises(ValueError, match=f"{INDEX} is damaged: it is not "):
            read()


@pytest.mark.parametrize("content", WITHOUT_FILES.values(), ids=WITHOUT_FILES)
def test_an_index_without_files_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match="its `weight_map` names no files"):
        weight_files(tmp_path)
