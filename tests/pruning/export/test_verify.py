from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from secateur.pruning.export import verify
from secateur.pruning.export.cut import cut
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.export.verify import (
    ExportError,
    record,
    rounding_noise,
    verify_cut,
    verify_export,
)
from secateur.pruning.files.headers import WEIGHTS
from secateur.pruning.files.model_folder import CONFIG, MARK
from secateur.pruning.plan import Plan
from secateur.pruning.widths.gate_hooks import GateHooks
from tests.pruning.export.plans import uneven_plan
from tests.tiny import VOCABULARY, tiny_folder, tiny_llama

WINDOWS_BT = torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))


def exported(path: Path, with_gains: bool = True, **overrides: Any) -> tuple[Plan, Path]:
    base = tiny_folder(path / "base", **overrides)
    plan = uneven_plan(base, with_gains=with_gains)
    prune_checkpoint(base, plan, path / "small")
    (path / "small" / MARK).unlink()  # which tells what has been changed since
    return plan, path / "small"


def tamper(folder: Path, name: str, index: int | None = None) -> None:
    """Damage one tensor: swap an index for its neighbour, or change a weight."""
    tensors = load_file(folder / WEIGHTS)
    if index is None:
        tensors[name] = tensors[name] + 0.5
    else:
        tensors[name][-1] = index
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_true_export_passes_and_the_model_is_as_before(tmp_path: Path) -> None:
    plan, folder = exported(tmp_path)
    dense = tiny_llama().train()
    hooks = [len(module._forward_hooks) for module in dense.modules()]
    assert 0 < verify_export(dense, plan, folder, WINDOWS_BT) < 1e-4
    assert dense.training
    assert hooks == [len(module._forward_hooks) for module in dense.modules()]


def test_shortest_and_longest_windows(tmp_path: Path) -> None:
    plan, folder = exported(tmp_path, max_position_embeddings=17)
    verify_export(tiny_llama(max_position_embeddings=17), plan, folder, WINDOWS_BT)
    verify_export(tiny_llama(max_position_embeddings=17), plan, folder, WINDOWS_BT[:1, :2])


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("model.layers.2.mlp_out.index", 23, r"whole windows.* first difference is in block 2"),
        ("model.layers.0.input_layernorm.index", 23, "first difference is in block 0"),
        ("model.layers.1.mlp.up_proj.weight", None, "first difference is in block 1"),
        ("model.embed_tokens.weight", None, "embeddings differ"),
        ("lm_head.weight", None, "No block differs by as much .* the head"),
    ],
)
def test_a_wrong_tensor_is_found_and_its_block_named(
    name: str, index: int | None, message: str, tmp_path: Path
) -> None:
    plan, folder = exported(tmp_path)
    tamper(folder, name, index)
    with pytest.raises(ExportError, match=message):
        verify_export(tiny_llama(), plan, folder, WINDOWS_BT)


def test_a_nan_is_found(tmp_path: Path) -> None:
    plan, folder = exported(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="off by nan"):
        verify_export(tiny_llama(), plan, folder, WINDOWS_BT)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    plan, folder = exported(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.2.attn_out.index"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"lacks 1 tensors .*layers\.2\.attn_out\.index"):
        verify_export(tiny_llama(), plan, folder, WINDOWS_BT)


def test_a_config_out_of_step_is_found(tmp_path: Path) -> None:
    plan, folder = exported(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    config["block_widths"][2]["mlp_mid"] += 2
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"cannot be loaded|mismatched keys"):
        verify_export(tiny_llama(), plan, folder, WINDOWS_BT)


def test_another_number_of_parameters_is_found(tmp_path: Path) -> None:
    plan, folder = exported(tmp_path)
    kept = [
        i[:-1] if s.key == "2.mlp_mid" else i for s, i in zip(plan.sites, plan.kept, strict=True)
    ]
    smaller = Plan("llama", plan.base, plan.sites, tuple(kept))
    with pytest.raises(ExportError, match=r"has \d+ parameters, expected by the plan are \d+"):
        verify_export(tiny_llama(), smaller, folder, WINDOWS_BT)


def test_a_bf16_model_is_compared_in_float32_on_a_copy(tmp_path: Path) -> None:
    plan, folder = exported(tmp_path, with_gains=False)  # a float32 file, trained on in bf16
    live: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    hooks = GateHooks(live)  # as in training: open, and no part of the copy
    assert verify_export(live, plan, folder, WINDOWS_BT) < 1e-4
    assert {parameter.dtype for parameter in live.parameters()} == {torch.bfloat16}
    hooks.remove()


def test_a_large_model_is_compared_in_its_own_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "FLOAT32_PARAMETERS", 0)
    base = tmp_path / "base"
    tiny_llama().to(torch.bfloat16).save_pretrained(base)
    plan = uneven_plan(base)
    prune_checkpoint(base, plan, tmp_path / "small")
    (tmp_path / "small" / MARK).unlink()
    live: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    monkeypatch.delattr(verify, "_in_float32")  # no copy is made
    verify_export(live, plan, tmp_path / "small", WINDOWS_BT)
    tamper(tmp_path / "small", "model.layers.2.mlp_out.index", 23)
    with pytest.raises(ExportError, match="block 2"):
        verify_export(live, plan, tmp_path / "small", WINDOWS_BT)


def cut_in_bfloat16(path: Path) -> tuple[Any, Plan, Any]:
    """A dense model in bfloat16, a plan, and the model that it leaves, in memory."""
    plan = uneven_plan(tiny_folder(path), with_gains=False)
    live: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return live, plan, cut(live, plan)


def test_a_cut_in_memory_is_compared_in_float32(tmp_path: Path) -> None:
    """In bfloat16 a deep model can differ by more than any fixed number of roundings."""
    live, plan, narrow = cut_in_bfloat16(tmp_path)
    assert verify_cut(live, plan, narrow, WINDOWS_BT) < 1e-4
    # A model may amplify its roundings beyond any tolerance.
    assert verify_cut(live, plan, narrow, WINDOWS_BT, tolerance=1e-12) > 1e-12
    with torch.no_grad():
        narrow.get_parameter("model.layers.2.mlp.down_proj.weight")[0, 0] += 0.25
    with pytest.raises(ExportError, match="block 2"):
        verify_cut(live, plan, narrow, WINDOWS_BT)


def test_roundings_are_allowed_as_far_as_a_model_amplifies_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "FLOAT32_PARAMETERS", 0)
    live, plan, narrow = cut_in_bfloat16(tmp_path)
    verify_cut(live, plan, narrow, WINDOWS_BT)
    wide = tiny_llama().eval()
    said = record(wide, WINDOWS_BT)[0]
    small, large = (rounding_noise(wide, said, kind) for kind in (torch.float16, torch.bfloat16))
    assert 0 < small < large
    with torch.no_grad():
        narrow.get_parameter("model.layers.2.mlp.down_proj.weight").mul_(4)
    with pytest.raises(ExportError, match="block 2"):
        verify_cut(live, plan, narrow, WINDOWS_BT)
