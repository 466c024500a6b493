from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pruning.budget import Budget
from pruning.costs import Flops
from pruning.export import slices
from pruning.export.model_card import ModelCard
from pruning.export.verify import ExportError
from pruning.export.writer import export_model
from pruning.families import family_of, skeleton
from pruning.fingerprint import fingerprint
from pruning.plan import PruningPlan, plan_from_indices
from pruning.sites import find_sites
from tests.pruning.export.plans import uneven_plan
from tests.tiny import tiny_folder, tiny_llama

CARD = ModelCard("A tiny Llama", "tests/tiny")


def test_the_folder_is_complete_and_loads(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    plan = uneven_plan(base)
    assert export_model(base, plan, tmp_path / "small", lambda folder: CARD) < 1e-4
    assert (tmp_path / "small" / "README.md").read_text() == CARD.render(plan)
    assert PruningPlan.load(tmp_path / "small").widths == plan.widths
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    given = tokenizer("Cut above a bud", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**given, max_new_tokens=3, pad_token_id=0).shape[0] == 1


def test_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    for name in ("a", "b"):
        export_model(
            base, uneven_plan(base), tmp_path / name, lambda folder: CARD, model=tiny_llama()
        )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)[0] == names


def test_an_export_that_is_wrong_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_folder(tmp_path / "base")
    export_model(base, uneven_plan(base, 1), tmp_path / "small", lambda folder: CARD)
    before = sorted(tmp_path.iterdir()), fingerprint(tmp_path / "small")
    # The live model is another one than the checkpoint that was cut.
    for name in ("small", "new"):
        with pytest.raises(ExportError, match="differs from the masked one"):
            export_model(
                base,
                uneven_plan(base),
                tmp_path / name,
                lambda folder: CARD,
                model=tiny_llama(seed=1),
            )
    # Surgery that forgets to sort out the rows of an axis.
    buffers = slices.index_buffers
    monkeypatch.setattr(
        slices,
        "index_buffers",
        lambda family: buffers(family) | {"mlp_out.index": "attn_out"},
    )
    with pytest.raises(ExportError):
        export_model(base, uneven_plan(base), tmp_path / "new", lambda folder: CARD)
    assert (sorted(tmp_path.iterdir()), fingerprint(tmp_path / "small")) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama7m", "stories260K"])
def test_real_models_at_half_of_their_flops(name: str, data: Path, tmp_path: Path) -> None:
    base = data / "models" / name
    model = skeleton(AutoConfig.from_pretrained(base))
    sites = find_sites(model, family_of(model.config))
    table = Flops().table(model)
    scores_N = torch.rand(
        sum(site.size for site in sites), generator=torch.Generator().manual_seed(0)
    )
    kept = Budget(keep=0.5).finalise(scores_N, sites, table)
    plan = plan_from_indices(model, fingerprint(base), kept, {"scores": "random"})
    assert export_model(base, plan, tmp_path / "small", lambda folder: CARD) < 1e-4
    dense, small = ((f / "model.safetensors").stat().st_size for f in (base, tmp_path / "small"))
    assert small < 0.75 * dense
