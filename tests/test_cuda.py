"""What only a GPU can show; everything else is tested on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.export.verify import verify_export
from secateur.pruning.families import FAMILIES
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.measure.speed import measure_speed
from secateur.pruning.measure.zero_shot import Ending, log_likelihoods
from tests.pruning.export.plans import uneven_plan
from tests.tiny import VOCABULARY, tiny_family_folder, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
FULL = {"rtol": 0.0, "atol": 1e-3}  # kernels of another device sum in another order


def windows() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def exported(path: Path, family: str, **settings: Any) -> Any:
    base = tiny_family_folder(path / "base", family)
    prune_checkpoint(base, uneven_plan(base), path / "small")
    return AutoModelForCausalLM.from_pretrained(path / "small", trust_remote_code=True, **settings)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_export_computes_the_same_on_both_devices(family: str, tmp_path: Path) -> None:
    expected_BTV = exported(tmp_path, family)(windows()).logits
    on_gpu: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", trust_remote_code=True, device_map="cuda"
    )
    torch.testing.assert_close(on_gpu(windows().cuda()).logits.cpu(), expected_BTV, **FULL)
    plan = uneven_plan(tmp_path / "base")
    dense = tiny_model(family).cuda()
    assert verify_export(dense, plan, tmp_path / "small", windows(), tolerance=1e-3) < 1e-3


@torch.no_grad()
def test_a_compiled_export_decodes_in_graphs(tmp_path: Path) -> None:
    model = exported(tmp_path, "llama", device_map="cuda")
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    settings |= {"attention_mask": torch.ones(2, 12, dtype=torch.long, device="cuda")}
    plain = model.generate(windows().cuda(), **settings)
    # A static cache makes transformers compile the decoding step and record it.
    recorded = model.generate(windows().cuda(), cache_implementation="static", **settings)
    assert torch.equal(recorded, plain)


def test_gradients_agree_in_bf16(tmp_path: Path) -> None:
    model = exported(tmp_path, "llama", device_map="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(windows().cuda(), labels=windows().cuda()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_measures_find_the_same_and_see_the_memory() -> None:
    cpu, gpu = tiny_model("llama"), tiny_model("llama").cuda()
    assert perplexity(gpu, windows()).mean_nll == pytest.approx(
        perplexity(cpu, windows()).mean_nll, abs=1e-3
    )
    endings = [Ending((1, 5, 6, 7), 2, 4), Ending((1, 9), 1, 2)]
    found_E, expected_E = (log_likelihoods(model, endings, 2) for model in (gpu, cpu))
    torch.testing.assert_close(found_E, expected_E, **FULL)
    speed = measure_speed({"gpu": gpu}, prompt_tokens=8, new_tokens=2, repeats=1)["gpu"]
    weights = sum(p.numel() * p.element_size() for p in gpu.parameters())
    assert speed.peak_memory_bytes is not None
    assert speed.peak_memory_bytes > weights
