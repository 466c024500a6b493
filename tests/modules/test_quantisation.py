from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from transformers import LlamaConfig

from secateur.modules import ShardedDDP, Zero
from secateur.modules.device_memory import optimizer_bytes
from secateur.modules.quantisation import (
    EightBit,
    FourBit,
    Quantisation,
    check_optimizer,
    check_quantised_run,
    load_original,
    load_quantised,
)
from secateur.pruning.chains import Step, kinds_of, refuse
from secateur.pruning.costs import Flops, Parameters
from secateur.pruning.families import skeleton
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.plan import Plan
from secateur.pruning.widths.gate_hooks import GateHooks
from secateur.pruning.widths.memory import Run, footprint
from tests.runs import NOISE, call, content, learn_masks, make_inputs
from tests.tiny import tiny_folder

pytestmark = NOISE
CPU = torch.device("cpu")
PACKED = {FourBit: torch.uint8, EightBit: torch.int8}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(params=PACKED)
def quantisation(request: pytest.FixtureRequest) -> Quantisation:
    made: Quantisation = request.param()
    return made


@pytest.fixture
def packed(inputs: Path, quantisation: Quantisation) -> Any:
    model = load_quantised(BaseModel(inputs / "base"), quantisation, "auto", CPU)
    return model.requires_grad_(False)


def test_only_projections_of_blocks_are_packed(
    packed: Any, inputs: Path, quantisation: Quantisation
) -> None:
    for name, parameter in packed.named_parameters():
        projection = "layers" in name and name.endswith("proj.weight")
        assert parameter.dtype == (PACKED[type(quantisation)] if projection else torch.float32), (
            name
        )
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    dense: Any = BaseModel(inputs / "base").load()
    with torch.no_grad():
        difference = (packed(ids).logits - dense(ids).logits).std() / dense(ids).logits.std()
    assert 1e-4 < float(difference) < (0.35 if isinstance(quantisation, FourBit) else 0.05)


def test_sites_and_costs_are_those_of_the_original(packed: Any, inputs: Path) -> None:
    dense = BaseModel(inputs / "base").load()
    hooks = GateHooks(packed)
    assert hooks.sites == GateHooks(dense).sites
    for cost in (Flops(), Parameters(whole_model=True)):
        found, expected = cost.table(skeleton(packed.config)), cost.table(dense)
        widths = expected.full_S * 0.5
        assert (found.dense, float(found(widths))) == (expected.dense, float(expected(widths)))


def test_every_gate_has_a_gradient_before_and_after_an_evaluation(packed: Any) -> None:
    # Where the processor has instructions for it, bitsandbytes would pack 4-bit weights anew in
    # evaluation mode.
    hooks = GateHooks(packed.train())
    gates = [torch.ones(site.size, requires_grad=True) for site in hooks.sites]
    ids = torch.randint(320, (4, 16), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        with hooks.applied(gates):
            loss = packed(ids, labels=ids).loss
        return list(torch.autograd.grad(loss, gates))

    before = gradients()
    assert all(bool(gradient.any()) for gradient in before)
    with torch.no_grad():
        packed.eval()(ids)
    packed.train()
    for first, second in zip(before, gradients(), strict=True):
        assert torch.equal(first, second)


def test_memory_of_packed_weights_is_as_predicted(
    quantisation: Quantisation, tmp_path: Path
) -> None:
    tiny_folder(tmp_path, hidden_size=384, intermediate_size=1000, num_hidden_layers=1)
    model: Any = load_quantised(BaseModel(tmp_path), quantisation, "bfloat16", CPU)
    found = 0
    for parameter in model.parameters():
        found += parameter.nbytes
        if isinstance(quantisation, FourBit) and (state := getattr(parameter, "quant_state", None)):
            found += state.absmax.nbytes + state.state2.absmax.nbytes
        elif (scales := getattr(parameter, "SCB", None)) is not None:
            found += scales.nbytes
    run = Run(dtype=torch.bfloat16, storage=quantisation.storage)
    predicted = footprint(BaseModel(tmp_path).config, run).weights
    assert found == pytest.approx(predicted, rel=0.01)
    assert predicted < (0.4 if isinstance(quantisation, FourBit) else 0.6) * 2 * (
        sum(p.numel() for p in BaseModel(tmp_path).load().parameters())
    )


def test_a_packed_layer_does_not_keep_its_input(packed: Any) -> None:
    """Frozen weights need no gradient, and so no inputs: these are alive while a block computes."""
    alive: list[weakref.ref[torch.Tensor]] = []
    for module in packed.modules():
        if "Linear" in type(module).__name__ and module is not packed.lm_head:
            module.register_forward_pre_hook(lambda _, inputs: alive.append(weakref.ref(inputs[0])))
    hidden_BTD = packed.get_input_embeddings()(torch.zeros(1, 8, dtype=torch.long))
    doubled_BTD = hidden_BTD.requires_grad_().mul(2.0)
    logits = packed(inputs_embeds=doubled_BTD).logits
    assert len(alive) == 7 * packed.config.num_hidden_layers
    assert not [reference for reference in alive if reference() is not None]
    (gradient,) = torch.autograd.grad(logits.sum(), hidden_BTD)
    assert bool(gradient.any())


# A run: masks learned on packed weights, with 8-bit states, exported from the original files.


def on_four_bits(inputs: Path, root: Path, *more: str) -> list[str]:
    return [
        *learn_masks(inputs, root),
        "--model.frozen.quantisation=FourBit",
        "--model.frozen.gradient_checkpointing=true",
        "--model.optimizer=bitsandbytes.optim.AdamW8bit",
        "--model.optimizer.lr=1e-2",
        *more,
    ]


def test_a_run_exports_the_original_weights_and_resumes_bitwise(
    inputs: Path, tmp_path: Path
) -> None:
    root, again = tmp_path / "whole", tmp_path / "resumed"
    line = call(on_four_bits(inputs, root))
    states = line.trainer.optimizers[0].state.values()
    assert any(state["state1"].dtype == torch.uint8 for state in states)

    plan = Plan.load(root / "plan")
    assert plan.base == fingerprint(inputs / "base")
    assert plan.provenance["learned_on"] == "FourBit()"
    ids = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))
    dense, exported = BaseModel(inputs / "base").load(), loaded(root / "model")
    with GateHooks(dense).applied(plan.gates(), plan.gains), torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, dense(ids).logits, atol=1e-4, rtol=0)

    checkpoint = root / "checkpoints" / "step=6.ckpt"
    call(on_four_bits(inputs, again, f"--ckpt_path={checkpoint}"))
    assert content(again / "plan") == content(root / "plan")
    eight = "--model.frozen.quantisation=EightBit"
    with pytest.raises(
        ValueError, match=r"`--model.frozen.quantisation` was 'FourBit\(\)' and is now 'EightBit"
    ):
        call(on_four_bits(inputs, tmp_path / "other", f"--ckpt_path={checkpoint}", eight))


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


# What cannot work is told at the start.


@pytest.mark.parametrize("strategy", [Zero(stage=3), ShardedDDP()])
def test_strategies_that_shard_the_model_are_refused(strategy: Any) -> None:
    with pytest.raises(ValueError, match="`quantisation` FourBit and `trainer.strategy`.*ZeRO st"):
        check_quantised_run(FourBit(), strategy)


def test_strategies_that_do_not_shard_are_accepted() -> None:
    check_quantised_run(FourBit(), Zero(stage=2))
    check_quantised_run(EightBit(), DDPStrategy())


def test_a_base_that_is_stored_packed_is_refused(inputs: Path) -> None:
    BaseModel(inputs / "base").refuse(Step.WIDTHS)
    config = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="`base` is stored quantised and cannot be cut"):
        refuse(kinds_of(config), Step.WIDTHS)


def test_paged_optimisers_are_refused_on_the_cpu() -> None:
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    parameters = [torch.nn.Parameter(torch.ones(3))]
    check_optimizer(AdamW8bit(parameters), CPU)
    check_optimizer(PagedAdamW8bit(parameters), torch.device("cuda"))
    with pytest.raises(ValueError, match="PagedAdamW8bit pages.*on cpu; use AdamW8bit here"):
        check_optimizer(PagedAdamW8bit(parameters), CPU)
    assert optimizer_bytes(AdamW8bit(parameters)) == pytest.approx(2.03, abs=0.01)
    assert optimizer_bytes(torch.optim.AdamW(parameters)) == 8


def test_a_missing_library_is_named(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ImportError("Using `bitsandbytes` 4-bit quantization requires accelerate")

    monkeypatch.setattr(BaseModel, "load", load)
    with pytest.raises(
        ValueError, match="`quantisation` FourBit needs bitsandbytes and accelerate"
    ):
        load_quantised(BaseModel(inputs / "base"), FourBit(), "auto", CPU)


def test_an_original_is_read_in_the_type_of_its_files(inputs: Path) -> None:
    assert load_original(BaseModel(inputs / "base"), CPU, copies=2).dtype == torch.float32
