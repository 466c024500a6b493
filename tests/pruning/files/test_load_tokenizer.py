from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from secateur.pruning.files.base_model import load_tokenizer
from tests.tiny import tiny_tokenizer

DAMAGED: dict[str, tuple[str, dict[str, Any]]] = {
    "a vocabulary that is none": ("tokenizer.json", {"model": {"type": "BPE", "vocab": []}}),
    "no model": ("tokenizer.json", {"model": None}),
    "a token that is none": ("tokenizer_config.json", {"unk_token": []}),
}


@pytest.mark.parametrize(("name", "change"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_tokenizer_is_named(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("Cut")["input_ids"]
    path = tmp_path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{tmp_path.name} has no readable tokenizer: ."):
        load_tokenizer(tmp_path)
