from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from secateur.pruning.costs import Flops
from secateur.pruning.export.deliver import export
from secateur.pruning.export.verify import ExportError
from secateur.pruning.families import FAMILIES, family_of, skeleton
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget
from tests.pruning.export.plans import uneven_plan
from tests.runs import content
from tests.tiny import tiny_folder, tiny_llama


def test_the_folder_is_complete_and_loads(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    plan = uneven_plan(base)
    export(base, plan, tmp_path / "small")
    assert str(plan.base) in (tmp_path / "small" / "README.md").read_text()
    assert Plan.load(tmp_path / "small").widths == plan.widths
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    given = tokenizer("Cut above a bud", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**given, max_new_tokens=3, pad_token_id=0).shape[0] == 1


def test_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    for name in ("a", "b"):
        export(base, uneven_plan(base), tmp_path / name, model=tiny_llama())
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_an_export_that_is_wrong_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_folder(tmp_path / "base")
    export(base, uneven_plan(base, 1), tmp_path / "small")
    before = sorted(tmp_path.iterdir()), fingerprint(tmp_path / "small")
    # The live model is another one than the checkpoint that was cut.
    for name in ("small", "new"):
        with pytest.raises(ExportError, match="differs from the masked one"):
            export(
                base,
                uneven_plan(base),
                tmp_path / name,
                model=tiny_llama(seed=1),
            )
    # Surgery that forgets to sort out the rows of an axis.
    family = FAMILIES["llama"]
    wrong = {**family.index_buffers, "mlp_out.index": "attn_out"}
    monkeypatch.setitem(vars(family), "index_buffers", wrong)
    with pytest.raises(ExportError):
        export(base, uneven_plan(base), tmp_path / "new")
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
    export(base, plan, tmp_path / "small")
    dense, small = ((f / "model.safetensors").stat().st_size for f in (base, tmp_path / "small"))
    assert small < 0.75 * dense
