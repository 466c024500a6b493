"""Runs that prune heads, from the command line and with callbacks: budget, export, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from secateur.callbacks import PruneWidths
from secateur.pruning.blocks.refit import Refit
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.heads import HEADS
from secateur.pruning.plan import Plan
from secateur.pruning.weights.gradually import Gradually
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gradual_ranking import GradualRanking
from tests import fits
from tests.pruning.widths.test_contract import SaveOnce
from tests.runs import NOISE, call, content, learn_masks, make_inputs

pytestmark = NOISE
SITES = [HEADS, "mlp_mid", "attn_in"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_key_value_heads=6)


def kept(base: Path, plan: Plan, budget: Budget) -> float:
    table = budget.cost.table(BaseModel(base).skeleton(), plan.family)
    return float(table.fraction(torch.tensor(plan.widths).double()))


@pytest.mark.parametrize("settle", ["cut", "masks"])
def test_masks_of_heads_are_learned_exported_and_resumed(
    settle: str, inputs: Path, tmp_path: Path
) -> None:
    def run(root: Path) -> list[str]:
        added = ["--model.budget.keep=0.6", f"--model.budget.sites=[{', '.join(SITES)}]"]
        added += ["--model.settle.cut=false"] if settle == "masks" else []
        return [*learn_masks(inputs, root), *added]

    call(run(tmp_path / "whole"))  # exports, and proves the export against the masks
    plan = Plan.load(tmp_path / "whole" / "plan")
    widths = {site.name: 0 for site in plan.sites}
    for site, width in zip(plan.sites, plan.widths, strict=True):
        widths[site.name] += site.size - width
    assert widths["mlp_out"] == widths["attn_out"] == 0 < widths[HEADS]
    assert 0.5 < kept(inputs / "base", plan, Budget()) <= 0.6
    checkpoint = tmp_path / "whole" / "checkpoints" / "step=6.ckpt"
    call([*run(tmp_path / "again"), f"--ckpt_path={checkpoint}"])
    assert content(tmp_path / "again" / "plan") == content(tmp_path / "whole" / "plan")
    weights = Path("model") / "model.safetensors"
    found, expected = ((tmp_path / name / weights).read_bytes() for name in ("again", "whole"))
    assert found == expected


def callback(uniform: bool) -> PruneWidths:
    return PruneWidths(
        Budget(0.7, uniform=uniform, sites=[HEADS] if uniform else [HEADS, "mlp_mid"]),
        search=GradualRanking(rounds=2, batches_per_round=1, batch_size=4),
        compensation=Refit(),
        gradually=None if uniform else Gradually(1, over=0.5),
        calibration_windows=48,
        held_back_windows=6,
    )


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("uniform", [False, True], ids=["gradually", "uniform"])
def test_heads_go_while_a_model_trains(uniform: bool, inputs: Path, tmp_path: Path) -> None:
    whole, between = callback(uniform), SaveOnce(tmp_path / "between.ckpt", step=1)
    module, _ = fits.fit(inputs, tmp_path / "whole", [whole, between], max_steps=4)
    assert len(whole.history) == (1 if uniform else 2)
    plan = module._plan()
    assert plan is not None
    assert kept(inputs / "base", plan, whole.budget) == pytest.approx(whole.history[-1]["kept"])
    assert whole.history[-1]["kept"] <= 0.7
    heads = [len(plan.index(block, HEADS)) for block in range(3)]
    assert min(heads) < 6
    assert not uniform or len(set(heads)) == 1

    again, _ = fits.fit(
        inputs, tmp_path / "again", [callback(uniform)], max_steps=4, ckpt_path=between.path
    )
    expected = weights(module.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(again.model).items())

    module.export(tmp_path / "model", "test")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    input_BT = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), module.plain() as live:
        torch.testing.assert_close(loaded(input_BT).logits, live.eval()(input_BT).logits)
        settings = {
            "max_new_tokens": 6,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        ours, theirs = (model.generate(input_BT, **settings) for model in (live, loaded))
    assert torch.equal(ours, theirs)
    assert all(map(torch.equal, Plan.load(tmp_path / "model").kept, plan.kept))
