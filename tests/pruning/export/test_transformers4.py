"""Exported stock models mean the same to transformers 4: equal logits, family by family.

Secateur itself needs transformers 5. The environment variable SECATEUR_TRANSFORMERS4 names an
interpreter that has transformers 4 and torch; `make test-oldest` makes one.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.pruning.export.rewrite import prune_blocks
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.finish import finish
from tests.tiny import VARIANTS, VOCABULARY, tiny_config, tiny_family_folder

PYTHON = os.environ.get("SECATEUR_TRANSFORMERS4")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="SECATEUR_TRANSFORMERS4 names no Python")

READ = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
ids = torch.load("ids.pt")
for name in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        name, torch_dtype=torch.float32, attn_implementation="eager"  # others ignore soft caps
    )
    with torch.no_grad():
        torch.save(model.eval()(ids).logits, f"{name}.pt")
"""
IDS_BT = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def other_rotations(family: str) -> dict[str, Any]:
    """Bases of rotations that are no default, so that a lost one shows."""
    rope: dict[str, Any] | None = getattr(tiny_config(family), "rope_parameters", None)
    if not rope:
        return {}
    if "rope_theta" in rope:
        return {"rope_parameters": rope | {"rope_theta": 70.0}}
    full = rope["full_attention"] | {"rope_theta": 70.0, "rope_type": "linear", "factor": 2.0}
    local = rope["sliding_attention"] | {"rope_theta": 30.0}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


def bases(folder: Path) -> dict[str, Path]:
    """A base model of every variant of every family, and of every scaling of rotations."""
    found = {}
    for family, variants in VARIANTS.items():
        for variant, fields in variants.items():
            name = re.sub(r"\W+", "_", f"{family} {variant}")
            found[name] = tiny_family_folder(
                folder / name, family, **other_rotations(family) | fields
            )
    for kind, fields in SCALED.items():
        rope = {"rope_type": kind, "rope_theta": 70.0, **fields}
        found[kind] = tiny_family_folder(folder / kind, "llama", rope_parameters=rope)
    return found


def test_transformers_4_reads_the_same_model(tmp_path: Path) -> None:
    torch.save(IDS_BT, tmp_path / "ids.pt")
    expected = {}
    for name, base in bases(tmp_path / "bases").items():
        prune_blocks(base, tmp_path / name, remove=[1])
        live = BaseModel(tmp_path / name).load()
        saved = f"saved_{name}"
        live.save_pretrained(tmp_path / saved)
        finish(tmp_path / saved)
        with torch.no_grad():
            expected[name] = expected[saved] = live.eval()(IDS_BT).logits
    assert PYTHON is not None
    command = [PYTHON, "-c", READ, *expected]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    differ = {
        name: float((torch.load(tmp_path / f"{name}.pt") - logits_BTV).abs().max())
        for name, logits_BTV in expected.items()
    }
    assert {name: by for name, by in differ.items() if not by < 1e-4} == {}
