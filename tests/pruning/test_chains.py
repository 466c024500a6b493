from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from secateur.pruning.chains import REFUSED, Kind, Step, kinds_of, refuse
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.modelling import config_class
from tests.tiny import tiny_folder


def test_only_steps_in_the_table_are_refused() -> None:
    for kind in Kind:
        for step in Step:
            if (kind, step) not in REFUSED:
                refuse({kind}, step)
                continue
            with pytest.raises(ValueError) as error:  # noqa: PT011 -- the text is compared below
                refuse({kind}, step)
            assert str(error.value) == REFUSED[kind, step]
    refuse(set(), Step.WIDTHS)
    refuse({Kind.NARROW}, Step.WIDTHS)


def test_kinds_are_read_from_the_configuration() -> None:
    packed = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    assert kinds_of(LlamaConfig()) == set()
    assert kinds_of(packed) == {Kind.PACKED}
    assert kinds_of(config_class("secateur_llama")()) == {Kind.NARROW}


@pytest.mark.parametrize(
    ("pattern", "refused"), [("NM(n=2, m=4)", True), ("Unstructured(sparsity=0.5)", False)]
)
def test_widths_do_not_follow_on_a_pattern(pattern: str, refused: bool, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path)
    figures = {"parameters": 1, "flops_per_token": 1, "perplexity": {}}
    stage = {"base": "b", "context_tokens": 16, "models": {"dense": figures, "pruned": figures}}
    stages = [stage | {"provenance": {"weights": {"settings": {"pattern": pattern}}}}]
    (base / "secateur.json").write_text(json.dumps({"stages": stages}))
    BaseModel(base).refuse(Step.BLOCKS)
    if not refused:
        BaseModel(base).refuse(Step.WIDTHS)
        return
    with pytest.raises(ValueError, match="zeros in a pattern.* then prune weights"):
        BaseModel(base).refuse(Step.WIDTHS)
    # Training without masks fills the zeros.
    stages.append(stage | {"provenance": {}})
    (base / "secateur.json").write_text(json.dumps({"stages": stages}))
    BaseModel(base).refuse(Step.WIDTHS)
