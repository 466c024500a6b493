"""peft trains adapters on our folders; what they leave is loaded by somebody without this code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.widths.budget import Budget
from tests.pruning.export.plans import random_plan, uneven_plan
from tests.stranger import run_as_stranger
from tests.tiny import VOCABULARY, tiny_folder

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

_RELOAD = """
import torch
from transformers import AutoModelForCausalLM

folder, given, found = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
torch.save(model(torch.load(given, weights_only=True)).logits.detach(), found)
"""


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def finetune(folder: Path, windows_BT: Tensor, lr: float, scratch: Path) -> list[float]:
    """Train adapters, merge and save, reload as a stranger and compare; returns the losses."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)  # of the adapters
    model = load(folder)
    before_BTV = model(windows_BT).logits.detach()
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    tuned: Any = peft.get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(6):
        loss = tuned(windows_BT, labels=windows_BT).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        expected_BTV = tuned.eval()(windows_BT).logits
    assert (expected_BTV - before_BTV).abs().max() > 0.1  # there is something to merge
    tuned.merge_and_unload().save_pretrained(scratch / "merged")
    torch.save(windows_BT, scratch / "given.pt")
    places = (scratch / name for name in ("merged", "given.pt", "found.pt"))
    run_as_stranger(_RELOAD, *places, folder=scratch)
    found_BTV = torch.load(scratch / "found.pt", weights_only=True)
    torch.testing.assert_close(found_BTV, expected_BTV, atol=1e-4, rtol=0)
    return losses


def test_a_tiny_model(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=True)
    prune_checkpoint(base, uneven_plan(base), tmp_path / "small")
    generator = torch.Generator().manual_seed(0)
    windows_BT = torch.randint(VOCABULARY, (2, 12), generator=generator)
    losses = finetune(tmp_path / "small", windows_BT, 1e-2, tmp_path)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_half_of_a_real_model(data: Path, tmp_path: Path) -> None:
    base = data / "models" / "llama7m"
    prune_checkpoint(base, random_plan(base, Budget(0.5)), tmp_path / "small")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    text = (data / "text" / "tinystories_val.txt").read_text(encoding="utf-8")[:4_000]
    windows_BT = torch.tensor(tokenizer(text)["input_ids"][:256]).view(4, 64)
    losses = finetune(tmp_path / "small", windows_BT, 3e-3, tmp_path)
    assert losses[-1] < losses[0] - 0.5  # nats
