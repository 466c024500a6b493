"""Exports that are wrong by little, in a narrow type and with gains, where logits tell least."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.pruning.export.exact import prove_cut, prove_saved, prove_shares
from secateur.pruning.export.gathered_weights import updated_sums, write_gathered
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.export.sources import FromFiles
from secateur.pruning.export.stages import Origin
from secateur.pruning.export.verify import ExportError, verify_export
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.lora import LoRA
from secateur.pruning.plan import Plan
from tests.pruning.export.plans import uneven_plan
from tests.tiny import VARIANTS, VOCABULARY, tiny_family_folder, tiny_llama

WINDOWS_BT = torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
Tensors, Config = dict[str, Tensor], dict[str, Any]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def of(block: int, name: str) -> str:
    return f"model.layers.{block}.{name}"


Q, K, V = (of(1, f"self_attn.{name}_proj.weight") for name in "qkv")
UP, GATE, DOWN = (of(1, f"mlp.{name}_proj.weight") for name in ("up", "gate", "down"))
INDEX = of(2, "input_layernorm.index")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact") / "base"
    tiny_llama(
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan(base: Path) -> Plan:
    return uneven_plan(base)


@pytest.fixture(scope="module")
def right(base: Path, plan: Plan) -> Path:
    prune_checkpoint(base, plan, base.parent / "right")
    (base.parent / "right" / "secateur.json").unlink()  # which tells what has been changed since
    return base.parent / "right"


def proof(base: Path, plan: Plan) -> Callable[[Path], object]:
    origin = Origin(str(base), base, plan.base)
    return FromFiles(plan, BaseModel(base).load()).proof(origin, WINDOWS_BT, torch.device("cpu"))


def test_the_right_export_passes_as_closely_as_in_float32(
    base: Path, plan: Plan, right: Path
) -> None:
    proof(base, plan)(right)
    assert 0 < verify_export(BaseModel(base).load(), plan, right, WINDOWS_BT) < 1e-4


def scale(factor: float, *names: str) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        for name in tensors:
            if any(part in name for part in names):
                tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    return change


def swap_rows(name: str) -> Callable[[Tensors, Config], None]:
    return lambda t, _: t.update({name: t[name][torch.tensor([1, 0, *range(2, len(t[name]))])]})


def swap(*names: str) -> Callable[[Tensors, Config], None]:
    first, second = names
    return lambda t, _: t.update({first: t[second].clone(), second: t[first].clone()})


def last_bit(name: str) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        tensors[name].view(torch.int16).flatten()[5] ^= 1

    return change


def other_index(tensors: Tensors, config: Config) -> None:
    index_W = tensors[INDEX]
    free = next(i for i in range(24) if i not in index_W.tolist())
    tensors[INDEX] = torch.cat([index_W[:-1], torch.tensor([free])]).sort().values


def permuted_neurons(tensors: Tensors, config: Config) -> None:
    """The same function of the input, and not what was asked for."""
    order = torch.arange(len(tensors[UP])).flip(0)
    tensors[UP], tensors[GATE] = tensors[UP][order], tensors[GATE][order]
    tensors[DOWN] = tensors[DOWN][:, order]


def as_type(dtype: torch.dtype) -> Callable[[Tensors, Config], None]:
    return lambda t, _: t.update({n: x.to(dtype) for n, x in t.items() if x.is_floating_point()})


def put(name: str, place: int, value: float) -> Callable[[Tensors, Config], None]:
    return lambda t, _: t[name].view(-1).__setitem__(place, value)


def say(**fields: Any) -> Callable[[Tensors, Config], None]:
    return lambda _, config: config.update(fields)


WRONG: dict[str, Callable[[Tensors, Config], Any]] = {
    "all projections 3 % too large": scale(1.03, "_proj"),
    "down_proj 10 % too large": scale(1.1, "down_proj"),
    "one block's o_proj 1 % too small": scale(0.99, of(1, "self_attn.o_proj")),
    "head 1 % too large": scale(1.01, HEAD),
    "two rows of q swapped": swap_rows(Q),
    "two embeddings swapped": swap_rows(EMBED),
    "two rows of the head swapped": swap_rows(HEAD),
    "k for v": swap(K, V),
    "up for gate": swap(UP, GATE),
    "norms of two blocks swapped": swap(of(1, "input_layernorm.weight"), NORM),
    "outputs shifted by one": lambda t, _: t.update({DOWN: t[DOWN].roll(1, 0)}),
    "last bit of a weight": last_bit(Q),
    "last bit of a norm": last_bit(NORM),
    "last bit of an embedding": last_bit(EMBED),
    "a sign": lambda t, _: t[UP].view(-1)[3].neg_(),
    "a zero": put(DOWN, 7, 0.0),
    "a NaN": put(DOWN, 7, float("nan")),
    "one other index": other_index,
    "neurons in another order": permuted_neurons,
    "float16": as_type(torch.float16),
    "float32": as_type(torch.float32),
    "a tensor is missing": lambda t, _: t.pop(NORM),
    "a tensor too many": lambda t, _: t.update({of(0, "mlp.up_proj.bias"): torch.ones(1)}),
    "another epsilon": say(rms_norm_eps=1e-5),
    "another base of rotations": say(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "another activation": say(hidden_act="gelu"),
    "other positions": say(max_position_embeddings=128),
    "other widths": lambda _, c: c["block_widths"][2].update(mlp_mid=36),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_export_is_refused(
    name: str, base: Path, plan: Plan, right: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(right, folder)
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    WRONG[name](tensors, config)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError):
        proof(base, plan)(folder)


def without_gains(plan: Plan) -> Plan:
    return dataclasses.replace(plan, gains=None)


def with_other_gains(change: Callable[[Tensor], Tensor]) -> Callable[[Plan], Plan]:
    def of_plan(plan: Plan) -> Plan:
        assert plan.gains is not None
        return dataclasses.replace(plan, gains={n: change(g) for n, g in plan.gains.items()})

    return of_plan


def with_other_entries(plan: Plan) -> Plan:
    kept = [
        (index_W + 1) % site.size if len(index_W) == 1 else index_W
        for site, index_W in zip(plan.sites, plan.kept, strict=True)
    ]
    return dataclasses.replace(plan, kept=tuple(kept))


OTHER_PLANS: dict[str, Callable[[Plan], Plan]] = {
    "no gains": without_gains,
    "gains twice": with_other_gains(lambda gain_F: gain_F**2),
    "inverse gains": with_other_gains(lambda gain_F: 1 / gain_F),
    "gains in the wrong order": with_other_gains(lambda gain_F: gain_F.flip(0)),
    "the next entries": with_other_entries,
}


@pytest.mark.parametrize("name", OTHER_PLANS)
def test_the_export_of_another_plan_is_refused(
    name: str, base: Path, plan: Plan, tmp_path: Path
) -> None:
    prune_checkpoint(base, OTHER_PLANS[name](plan), tmp_path / "other")
    with pytest.raises(ExportError, match="not what it should be to the bit"):
        proof(base, plan)(tmp_path / "other")


# Of those that the logits alone once let pass.
@pytest.mark.parametrize(
    "name",
    [
        "all projections 3 % too large",
        "down_proj 10 % too large",
        "head 1 % too large",
        "two rows of q swapped",
        "one other index",
        "a sign",
    ],
)
def test_the_logits_alone_tell_as_much(
    name: str, base: Path, plan: Plan, right: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(right, folder)
    tensors = load_file(folder / WEIGHTS)
    WRONG[name](tensors, {})
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="a logit is off by"):
        verify_export(BaseModel(base).load(), plan, folder, WINDOWS_BT)


@pytest.mark.parametrize(
    ("family", "variant"), [(family, name) for family in VARIANTS for name in VARIANTS[family]]
)
def test_exports_of_every_family_are_exact(family: str, variant: str, tmp_path: Path) -> None:
    base = tiny_family_folder(tmp_path / "base", family, **VARIANTS[family][variant])
    plan = uneven_plan(base)
    prune_checkpoint(base, plan, tmp_path / "small")
    prove_cut(BaseModel(base), plan, tmp_path / "small")
    again = uneven_plan(tmp_path / "small", seed=1)  # of a narrow base
    prune_checkpoint(tmp_path / "small", again, tmp_path / "smaller")
    prove_cut(BaseModel(tmp_path / "small"), again, tmp_path / "smaller")
    parts = uneven_plan(base, removed=[(1, "attn"), (2, "mlp"), (3, "attn"), (3, "mlp")])
    prune_checkpoint(base, parts, tmp_path / "parts")
    prove_cut(BaseModel(base), parts, tmp_path / "parts")


def test_a_saved_model_is_the_live_one_to_the_bit(tmp_path: Path) -> None:
    live = tiny_llama(tie_word_embeddings=True).bfloat16()
    live.save_pretrained(tmp_path)
    prove_saved(live, tmp_path)
    with torch.no_grad():
        live.get_parameter(Q).view(torch.int16).view(-1)[5] ^= 1
    with pytest.raises(ExportError, match=f"'{Q}' is not what it should be to the bit: 1 of 576"):
        prove_saved(live, tmp_path)
    other = tiny_llama(tie_word_embeddings=True, rms_norm_eps=1e-4).bfloat16()
    with pytest.raises(ExportError, match="`rms_norm_eps` in the exported config.json is 1e-06"):
        prove_saved(other, tmp_path)


def lora_at_work() -> Any:
    """A model with updates that are not zero, on one block's queries."""
    live = tiny_llama().bfloat16()
    LoRA(rank=2, targets=["q_proj"]).inject(live)
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return live


@pytest.mark.parametrize("name", ["last bit of a weight", "last bit of a norm", "k for v"])
def test_ranks_prove_their_shares_to_the_bit(name: str, tmp_path: Path) -> None:
    """Two ranks of halves: the one that holds the wrong entry tells; updates are told by both."""
    live = lora_at_work()
    write_gathered(live, tmp_path, torch.bfloat16, lambda _: nullcontext())
    sums = updated_sums(live, lambda _: nullcontext(), torch.bfloat16)
    assert set(sums) == {of(block, "self_attn.q_proj.weight") for block in range(3)}

    def prove(rank: int) -> None:
        def share(parameter: Tensor) -> tuple[Tensor, int]:
            half = -(-parameter.numel() // 2)
            return parameter.data.flatten()[rank * half :][:half], rank * half

        prove_shares(live, share, sums, torch.bfloat16, tmp_path)

    prove(0)
    prove(1)
    tensors = load_file(tmp_path / WEIGHTS)
    WRONG[name](tensors, {})
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="to the bit"):
        prove(0)
    if name != "last bit of a norm":  # of entry 5 of 24
        with pytest.raises(ExportError, match="to the bit"):
            prove(1)
