"""A narrow model is a base like any other: what a user types, for every family.

The base has blocks of unlike widths, one without attention and one without an MLP. All widths are
multiples of 4, as 2:4 zeros need them. Code is planted in its folder: nothing of it ever runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from secateur.pruning.blocks.linears import linears_of
from secateur.pruning.export import depth_command, rewrite
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.families import FAMILIES
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure import compare
from secateur.pruning.measure.sizes import count
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.sites import find_sites
from secateur.pruning.weights.masks import WeightMasks
from tests.ranks import Ranks
from tests.runs import NOISE, call, on_text, with_callbacks, write_text
from tests.tiny import tiny_family_folder, tiny_tokenizer

pytestmark = NOISE
REMOVED = [(0, "attn"), (3, "mlp")]
WIDTHS = {0: 4, 1: 99, 2: 12, 3: 8}  # of a block, at most


def narrow_plan(stock: Path) -> Plan:
    base = BaseModel(stock)
    family = base.family.with_parts()
    generator = torch.Generator().manual_seed(0)
    kept = []
    for site in find_sites(base.skeleton(), family):
        gone = (site.block, site.part) in REMOVED
        width = 0 if gone else min(site.size, WIDTHS[site.block])
        kept.append(torch.randperm(site.size, generator=generator)[:width].sort().values)
    return plan_from_indices(base.skeleton(), base.fingerprint, kept, {}, family=family)


# Four kinds of blocks; the other families are built as one of these, and test_narrow_contract.py
# has them all.
KINDS = ("llama", "gemma2", "opt", "phi")


@pytest.fixture(scope="module", params=KINDS)
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stock model `dense`, a narrow one `base` with a plant, and `text.json`."""
    folder, width = tmp_path_factory.mktemp(request.param), FAMILIES[request.param].mlp_width
    stock = tiny_family_folder(folder / "dense", request.param, **{width: 36})
    tiny_tokenizer().save_pretrained(stock)
    prune_checkpoint(stock, narrow_plan(stock), folder / "base")
    code = sorted((folder / "base").glob("*.py"))
    for path in [*code, folder / "base" / "modeling_secateur.py"]:
        path.write_text(f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n")
    write_text(folder / "text.json")
    return folder


def check_export(inputs: Path, root: Path, parameters: int | None = None) -> Any:
    """The exported model: narrow, complete, with code of ours; what was planted has not run."""
    assert not (inputs / "ran").exists()
    model: Any = BaseModel(root / "model").load()
    assert model.config.model_type == BaseModel(inputs / "base").config.model_type
    for path in (root / "model").glob("*.py"):
        assert "touch" not in path.read_text()
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))["models"]
    dense, made = (figures["counts"]["parameters"] for figures in report.values())
    assert dense == count(BaseModel(inputs / "base").load()).parameters
    assert made == (parameters or dense)
    card = (root / "model" / "README.md").read_text(encoding="utf-8")
    assert "trust_remote_code=True" in card
    assert "stock model" not in card
    return model


def recover(inputs: Path, root: Path, *more: str, max_steps: int = 2) -> None:
    call(
        [
            "fit",
            "--model=CausalLM",
            f"--model.base={inputs / 'base'}",
            *on_text(inputs, root),
            f"--trainer.max_steps={max_steps}",
            *more,
            *with_callbacks(["ExportModel"]),
        ]
    )


@pytest.mark.parametrize("trained", ["all weights", "low rank"])
def test_it_recovers_and_learns_from_the_dense_model(
    inputs: Path, tmp_path: Path, trained: str
) -> None:
    distil = ["--model.loss.distillation=1", f"--model.teacher={inputs / 'dense'}"]
    recover(inputs, tmp_path, *distil, *(["--model.lora.rank=2"] * (trained == "low rank")))
    model = check_export(inputs, tmp_path)
    before = load_file(inputs / "base" / "model.safetensors")
    after = {name: tensor for name, tensor in model.state_dict().items() if name in before}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert not [name for name in changed if name.endswith(".index")]
    projections = {p.path for p in BaseModel(inputs / "base").family.projections}
    of_low_rank = {name for name in changed if any(f".{p}.weight" in name for p in projections)}
    assert of_low_rank
    assert (changed == of_low_rank) == (trained == "low rank")


def test_its_weights_become_zero(inputs: Path, tmp_path: Path) -> None:
    pattern = ["--trainer.callbacks.pattern=NM", "--trainer.callbacks.pattern.n=2"]
    windows = ["--trainer.callbacks.calibration_windows=8"]
    recover(
        inputs,
        tmp_path,
        "--trainer.callbacks+=PruneWeights",
        *pattern,
        "--trainer.callbacks.pattern.m=4",
        *windows,
        "--trainer.callbacks.held_back_windows=4",
    )
    model, masks = check_export(inputs, tmp_path), WeightMasks.load(tmp_path / "weights")
    assert len(masks) == sum(map(len, linears_of(model)))
    for name in masks:
        assert torch.equal(model.get_parameter(name) != 0, masks[name])
        assert (~masks[name]).sum(1).eq(masks[name].shape[1] // 2).all()


@pytest.mark.parametrize("units", ["WholeBlocks", "HalfBlocks"])
def test_its_blocks_go(inputs: Path, tmp_path: Path, units: str) -> None:
    search = "--trainer.callbacks.search"
    recover(
        inputs,
        tmp_path,
        "--trainer.callbacks+=PruneBlocks",
        "--trainer.callbacks.target=UnitCount",
        "--trainer.callbacks.target.count=2",
        f"{search}=OneShot",
        f"{search}.score=Perplexity",
        f"{search}.units={units}",
        "--trainer.callbacks.calibration_windows=8",
        max_steps=0 if units == "HalfBlocks" else 2,
    )
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["models"]
    model = check_export(inputs, tmp_path, report["pruned"]["counts"]["parameters"])
    assert count(model).parameters == report["pruned"]["counts"]["parameters"]
    (stage,) = json.loads((tmp_path / "model" / "secateur.json").read_text())["stages"]
    gone = [key for removal in stage["provenance"]["depth"]["removals"] for key in removal["units"]]
    assert len(gone) == 2
    if units == "WholeBlocks":
        assert len(model.config.block_widths) == 2
    else:
        assert not {"0.attn", "3.mlp"} & set(gone)  # which it does not have


def test_its_masks_are_learned_again(inputs: Path, tmp_path: Path) -> None:
    family = BaseModel(inputs / "dense").config.model_type
    parts = family in ("llama", "opt")  # whole parts may go, too
    names = ["AnnealSparsity", "TrackBudget", "PlotWidths", "SaveCheckpoint", "ExportModel"]
    arguments = [
        "fit",
        "--model=MaskLearning",
        f"--model.base={inputs / 'base'}",
        "--model.budget.keep=0.7",
        f"--model.budget.parts={str(parts).lower()}",
        "--model.learning.start=null",  # importance reads far more text than these steps do
        *on_text(inputs, tmp_path),
        "--trainer.max_steps=4",
        *with_callbacks(names, every_n_steps=2),
    ]
    call(arguments)
    plan = Plan.load(tmp_path / "plan")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["models"]
    model = check_export(inputs, tmp_path, report["pruned"]["counts"]["parameters"])
    assert report["pruned"]["kept_block_flops"] <= 0.7
    assert report["pruned"]["kept_block_flops"] == pytest.approx(plan.provenance["kept"])
    # In coordinates of the dense model, both plans are one.
    both = narrow_plan(inputs / "dense").then(plan)
    found, expected = (
        [w for site, w in zip(p.sites, p.widths, strict=True) if w and not site.is_part]
        for p in (both, plan)
    )
    assert found == expected
    assert len(model.config.block_widths) == len(both.kept_blocks())
    assert not (inputs / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["llama", "phi"], indirect=True)
def test_ranks_divide_it_and_learn_from_the_dense_model(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    arguments = [
        "fit",
        "--model=CausalLM",
        f"--model.base={inputs / 'base'}",
        "--model.loss.distillation=1",
        f"--model.teacher={inputs / 'dense'}",
        "--model.lora.rank=2",
        *on_text(inputs, tmp_path / "run"),
        "--trainer.strategy={class_path: Zero, init_args: {stage: 3}}",
        "--trainer.devices=2",
        "--trainer.max_steps=2",
        *with_callbacks(["ExportModel"]),
    ]
    ranks = Ranks(tmp_path, 2)
    try:
        ranks.run("narrow", arguments)
    finally:
        ranks.close()
    model = check_export(inputs, tmp_path / "run")
    before = load_file(inputs / "base" / "model.safetensors")
    indices = {name: tensor for name, tensor in before.items() if name.endswith(".index")}
    assert indices
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in indices.items())


def test_commands_take_it(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = inputs / "base"
    plan = narrow_plan(base)
    plan.save(tmp_path / "plan")
    rewrite.main([str(base), str(tmp_path / "plan"), str(tmp_path / "cut")])
    depth_command.main([str(base), str(tmp_path / "short"), "--remove", "1"])
    text = tmp_path / "text.txt"
    text.write_text("Cut above a bud, at a slant, and the rain will run off the wood. " * 8)
    folders = [f"{name}={tmp_path / name}" for name in ("cut", "short")]
    compare.main([f"dense={inputs / 'dense'}", f"base={base}", *folders, "--text", str(text),
                  "--window-tokens", "16", "--device", "cpu"])  # fmt: skip
    assert "short" in capsys.readouterr().out
    for name in ("cut", "short"):
        assert BaseModel(tmp_path / name).family.narrow
        assert not [p for p in (tmp_path / name).glob("*.py") if "touch" in p.read_text()]
    assert not (inputs / "ran").exists()
