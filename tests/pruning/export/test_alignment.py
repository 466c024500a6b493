from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.pruning.export.alignment import compare_alignment
from secateur.pruning.families import family_of
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.sites import gain_sizes
from secateur.pruning.widths.budget import Budget
from secateur.pruning.widths.gate_hooks import GateHooks
from tests.tiny import tiny_folder, tiny_llama


def test_both_plans_are_measured_without_gains_and_on_budget(tmp_path: Path) -> None:
    base, dense = tiny_folder(tmp_path / "base"), tiny_llama()
    hooks = GateHooks(dense)
    table = Budget().cost.table(dense)
    count = sum(site.size for site in hooks.sites)
    scores_N = torch.rand(count, generator=torch.Generator().manual_seed(0))
    plans: dict[str, Plan] = {}
    for name, multiple in (("free widths", 1), ("aligned widths", 8)):
        kept = Budget(0.5, width_multiple=multiple).finalise(scores_N, hooks.sites, table)
        sizes = gain_sizes(dense, family_of(dense.config))
        gains = {name: torch.full((size,), 1.5) for name, size in sizes.items()}
        plans[name] = plan_from_indices(dense, fingerprint(base), kept, {}, gains)
    windows_NT = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(1))
    report = compare_alignment(
        dense, base, plans["aligned widths"], plans["free widths"], windows_NT
    )
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["dense", "free widths", "aligned widths"]
    for name, plan in plans.items():
        ones = Plan(plan.model_type, plan.base, plan.sites, plan.kept)
        with hooks.applied(ones.gates()):
            expected = perplexity(dense, windows_NT, 8).value
        assert rows[name].perplexity["validation"].value == pytest.approx(expected, rel=1e-4)
    widths = {w for s, w in zip(hooks.sites, plans["aligned widths"].widths, strict=True)}
    assert all(width % 8 == 0 or width == 37 for width in widths)
    flops = [rows[name].counts.block_flops_per_token for name in rows]
    assert flops[2] <= flops[1] <= flops[0] / 2
