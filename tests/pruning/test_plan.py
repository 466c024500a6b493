from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from secateur.pruning.families import FAMILIES, family_of
from secateur.pruning.plan import DESCRIPTION, TENSORS, Plan, full_plan, plan_from_indices
from secateur.pruning.sites import Site, find_sites, gain_sizes
from tests.tiny import tiny_llama, tiny_llama_config

SITES = (Site(0, "a", 4), Site(0, "b", 3), Site(1, "a", 4), Site(1, "b", 3))
KEPT = ([0, 2], [1], [0, 1, 2, 3], [0, 2])


def _plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "model_type": "llama",
        "base": "0" * 64,
        "sites": SITES,
        "kept": tuple(torch.tensor(index) for index in KEPT),
        "provenance": {"seed": 3, "command": "fit"},
    }
    return Plan(**settings | changes)


def test_widths_indices_and_gates() -> None:
    plan = _plan()
    assert plan.widths == [2, 1, 4, 2]
    assert plan.widths_by_block() == [{"a": 2, "b": 1}, {"a": 4, "b": 2}]
    assert plan.index(1, "b").tolist() == [0, 2]
    assert [gate.tolist() for gate in plan.gates()][:2] == [[1, 0, 1, 0], [0, 1, 0]]
    with pytest.raises(KeyError, match=r"2\.a"):
        plan.index(2, "a")


def test_gains_survive_the_disk(tmp_path: Path) -> None:
    gains = {"0.mlp.up_proj.input": torch.linspace(0.5, 1.5, 4)}
    loaded = Plan.load(_saved(tmp_path / "some", _plan(gains=gains)))
    assert loaded.gains is not None
    assert loaded.gains.keys() == gains.keys()
    assert torch.equal(loaded.gains["0.mlp.up_proj.input"], gains["0.mlp.up_proj.input"])
    assert Plan.load(_saved(tmp_path / "none", _plan())).gains is None


def _saved(folder: Path, plan: Plan) -> Path:
    plan.save(folder)
    return folder


def test_gains_are_finite() -> None:
    with pytest.raises(ValueError, match="gains 0.a must be finite"):
        _plan(gains={"0.a": torch.tensor([1.0, float("nan")])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.mlp.up_proj.input": torch.ones(3)}, "0.mlp.up_proj.input it has 3 gains, .* has 24"),
        ({"0.mlp.up_proj.inside": torch.ones(24)}, "of 0.mlp.up_proj.inside it has 24 gains"),
    ],
)
def test_gains_fit_the_features_of_the_model(changes: Any, message: str) -> None:
    model = tiny_llama()
    gains = {
        name: torch.ones(size) for name, size in gain_sizes(model, family_of(model.config)).items()
    }
    plan = full_plan(model, "x")
    replace(plan, gains=gains).verify(model.config)
    with pytest.raises(ValueError, match=message):
        replace(plan, gains=gains | changes).verify(model.config)


def test_description_is_a_table() -> None:
    assert _plan().describe() == "block  a/4  b/3\n    0    2    1\n    1    4    2"


def test_saved_and_loaded(tmp_path: Path) -> None:
    plan = _plan()
    plan.save(tmp_path / "new" / "folder")
    loaded = Plan.load(tmp_path / "new" / "folder")
    assert (loaded.model_type, loaded.base, loaded.sites) == (plan.model_type, plan.base, SITES)
    assert loaded.provenance == plan.provenance
    assert all(torch.equal(a, b) for a, b in zip(loaded.kept, plan.kept, strict=True))
    assert all(index.dtype == torch.int64 for index in loaded.kept)


def test_equal_plans_are_equal_files(tmp_path: Path) -> None:
    _plan().save(tmp_path / "1")
    _plan(provenance={"command": "fit", "seed": 3}).save(tmp_path / "2")
    Plan.load(tmp_path / "1").save(tmp_path / "3")
    for name in (TENSORS, DESCRIPTION):
        first = (tmp_path / "1" / name).read_bytes()
        assert first == (tmp_path / "2" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (([0, 2], [1], [0]), "3 index sets were given for 4 sites"),
        (([], [1], [0], [0]), r"Site 0\.a keeps nothing"),
        (([2, 0], [1], [0], [0]), r"site 0\.a must be sorted and unique"),
        (([0], [1, 1], [0], [0]), r"site 0\.b must be sorted and unique"),
        (([0], [1], [-1, 0], [0]), r"site 1\.a must be in \[0, 4\)"),
        (([0], [1], [0], [3]), r"site 1\.b must be in \[0, 3\)"),
    ],
)
def test_index_sets_that_are_not(kept: tuple[list[int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plan(kept=tuple(torch.tensor(index, dtype=torch.int64) for index in kept))


def test_a_plan_fits_its_own_model_only() -> None:
    plan = full_plan(tiny_llama(), base="x")
    plan.verify(tiny_llama_config())
    with pytest.raises(ValueError, match=r"site 0\.mlp_mid has 37 entries .* 0\.mlp_mid with 38"):
        plan.verify(tiny_llama_config(intermediate_size=38))
    with pytest.raises(ValueError, match="it has 15 sites, the model 20"):
        plan.verify(tiny_llama_config(num_hidden_layers=4))
    with pytest.raises(ValueError, match="it has 15 sites, the model 10"):
        plan.verify(tiny_llama_config(num_hidden_layers=2))
    with pytest.raises(ValueError, match="'gpt2' is not a known family"):
        plan.verify(GPT2Config())
    with pytest.raises(ValueError, match=r"made for a 'mistral' model .* prune a 'llama' model"):
        Plan("mistral", "x", plan.sites, plan.kept).verify(tiny_llama_config())


def test_plans_of_a_live_model() -> None:
    model = tiny_llama()
    sites = find_sites(model, FAMILIES["llama"])
    assert full_plan(model, "x").widths == [site.size for site in sites]
    kept = [torch.tensor([0, site.size - 1]) for site in sites]
    plan = plan_from_indices(model, "x", kept, {"step": 4})
    assert (plan.model_type, plan.sites, plan.provenance) == ("llama", tuple(sites), {"step": 4})
    assert plan.index(2, "mlp_mid").tolist() == [0, 36]


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / DESCRIPTION).unlink(), "holds no readable plan"),
        (lambda folder: (folder / TENSORS).unlink(), "holds no readable plan"),
        (lambda folder: (folder / DESCRIPTION).write_text("{"), "holds no readable plan"),
        (
            lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1]),
            "holds no readable plan",
        ),
        (lambda folder: _rewrite(folder, lambda plan: [1]), "has format None"),
        (lambda folder: _rewrite(folder, lambda plan: plan | {"format": "2"}), "has format '2'"),
        (
            lambda folder: _rewrite(
                folder, lambda plan: {k: v for k, v in plan.items() if k not in ("base", "sites")}
            ),
            "lacks base, sites",
        ),
        (
            lambda folder: _rewrite(
                folder, lambda plan: plan | {"sites": [*plan["sites"], [7, "a", 3]]}
            ),
            r"lacks the sites 7\.a",
        ),
        (lambda folder: _rewrite(folder, lambda plan: plan | {"sites": [[0, "a"]]}), "`sites`"),
        (
            lambda folder: _rewrite(folder, lambda plan: plan | {"provenance": {"seed": 9}}),
            "are damaged: their checksum differs",
        ),
    ],
)
def test_damaged_plans_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    _plan().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Plan.load(tmp_path)


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION])
def test_every_bit_of_a_plan_counts(name: str, tmp_path: Path) -> None:
    plan = _plan(provenance={"seed": 2}, gains={"0.q.input": torch.ones(3)})
    plan.save(tmp_path)
    before = (tmp_path / name).read_bytes()
    for place in range(len(before)):
        changed = bytearray(before)
        changed[place] ^= 1 << place % 8
        (tmp_path / name).write_bytes(changed)
        try:
            found = Plan.load(tmp_path)
        except ValueError:
            continue
        found.save(tmp_path / "again")  # a space that became another sign of no meaning
        (tmp_path / name).write_bytes(before)
        assert (tmp_path / "again" / name).read_bytes() == before, place


def test_a_plan_from_before_there_were_checksums_is_read(tmp_path: Path) -> None:
    _plan().save(tmp_path)
    _rewrite(tmp_path, lambda plan: {k: v for k, v in plan.items() if k != "checksum"})
    assert Plan.load(tmp_path).sites == SITES


def test_which_plans_leave_a_stock_model() -> None:
    sites = tuple(Site(b, name, 3) for b in range(2) for name in ("attn_in", "mlp_mid"))
    whole, two, one = torch.arange(3), torch.tensor([0, 2]), torch.tensor([1])

    def width(*kept: torch.Tensor) -> int | None:
        return (Plan("llama", "x", sites, kept).stock_widths() or {}).get("mlp_mid")

    assert width(whole, whole, whole, whole) == 3
    assert width(whole, two, whole, torch.tensor([0, 1])) == 2
    assert width(whole, two, whole, one) is None
    assert width(two, two, whole, two) is None
    assert width(two, whole, two, whole) is None  # no stock model has such norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_indices_of_another_type_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "plan", _plan())
    tensors = load_file(folder / TENSORS)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / TENSORS)
    with pytest.raises(ValueError, match=f"has {name} as {dtype} .*, expected a vector of"):
        Plan.load(folder)
