"""What every pruning method has to keep, one row per method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import secateur.modules
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure.sizes import Counts, count
from secateur.pruning.plan import Plan
from secateur.pruning.protocols import LearnsMasks
from secateur.pruning.widths.gate_hooks import GateHooks
from tests.runs import NOISE, call, content, learn_masks, make_inputs

pytestmark = NOISE


@dataclass(frozen=True)
class Method:
    """A method and how the contract is read for it.

    Args:
        module: The class of `modules` that runs it.
        fit: Arguments of a whole run: folder of the inputs, output folder.
        cost: What its budget of one half counts.
        unit: Most that the finest step of its budget costs on the model of these tests.
    """

    module: type
    fit: Callable[[Path, Path], list[str]]
    cost: Callable[[Counts], int]
    unit: int


METHODS = {
    "disp": Method(
        module=secateur.modules.MaskLearning,
        fit=learn_masks,
        cost=lambda counts: counts.block_flops_per_token,
        unit=2 * 3 * 37,  # FLOPs: one column of three matrices of 37 rows
    ),
}


def test_the_table_has_a_row_for_every_module_that_prunes() -> None:
    # What prunes has a plan; modules that only train weights have none.
    modules = {name: getattr(secateur.modules, name) for name in secateur.modules.__all__}
    pruning = {name for name, module in modules.items() if hasattr(module, "plan")}
    assert pruning == {method.module.__name__ for method in METHODS.values()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", params=METHODS)
def run(
    request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Method, Path]:
    """A method and the output folder of its finished run."""
    method, root = METHODS[request.param], tmp_path_factory.mktemp(request.param)
    line = call(method.fit(inputs, root))
    assert isinstance(line.model, method.module)
    assert isinstance(line.model, LearnsMasks)
    return method, root


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_it_hits_its_target_exactly(run: tuple[Method, Path], inputs: Path) -> None:
    method, root = run
    dense, pruned = (method.cost(count(load(f))) for f in (inputs / "base", root / "model"))
    assert dense // 2 - method.unit < pruned <= dense // 2


def test_it_keeps_its_structure(run: tuple[Method, Path]) -> None:
    _, root = run
    plan = Plan.load(root / "plan")
    with safe_open(root / "model" / "model.safetensors", framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for block, widths in enumerate(plan.widths_by_block()):
        name = f"model.layers.{block}.{{}}.weight".format
        assert shapes[name("mlp.up_proj")] == (widths["mlp_mid"], widths["mlp_in"])
        assert shapes[name("mlp.down_proj")] == (widths["mlp_out"], widths["mlp_mid"])
        assert shapes[name("self_attn.q_proj")] == (24, widths["attn_in"])
        assert shapes[name("self_attn.o_proj")] == (widths["attn_out"], 24)


def test_it_exports_what_it_masked(run: tuple[Method, Path], inputs: Path, tmp_path: Path) -> None:
    method, _ = run
    root = tmp_path / "masks"
    arguments = [a for a in method.fit(inputs, root) if not a.startswith("--model.settle")]
    call([*arguments, "--model.settle=null"])
    dense: Any = BaseModel(inputs / "base").load()
    ids = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))
    plan = Plan.load(root / "plan")
    with GateHooks(dense).applied(plan.gates(), plan.gains), torch.no_grad():
        masked = dense(ids).logits
        exported = load(root / "model")(ids).logits
    torch.testing.assert_close(exported, masked, atol=1e-4, rtol=0)
    with torch.no_grad():
        assert float((dense(ids).logits - masked).abs().max()) > 0.1  # the masks do something


def test_it_resumes_bitwise(run: tuple[Method, Path], inputs: Path, tmp_path: Path) -> None:
    method, root = run
    checkpoint = root / "checkpoints" / "step=6.ckpt"
    call([*method.fit(inputs, tmp_path), f"--ckpt_path={checkpoint}"])
    assert content(tmp_path / "plan") == content(root / "plan")
    weights = Path("model") / "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (root / weights).read_bytes()


def test_it_survives_a_second_fit(run: tuple[Method, Path], inputs: Path) -> None:
    method, root = run
    before = content(root / "model")
    with pytest.warns(UserWarning, match="of an earlier run"):
        call(method.fit(inputs, root))
    assert content(root / "model") == before  # replaced by its equal, with nothing left beside it
    assert {path.name for path in root.iterdir() if path.name[0] == "."} <= {".lock"}
