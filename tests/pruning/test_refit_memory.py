"""The predicted memory of a refit against tracked storages."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.pruning.blocks.refit import Refit, refit
from secateur.pruning.blocks.refit_memory import refit_bytes
from secateur.pruning.export.cut import cut
from secateur.pruning.plan import full_plan
from secateur.pruning.widths.live_bytes import LiveBytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("stream", "mlp", "kv_heads", "windows", "batch_size"),
    [
        (64, 128, 4, 32, 1),  # the solution of the widest layer is most of it
        (64, 128, 2, 64, 8),  # the windows are
        (64, 256, 4, 64, 1),
        (128, 256, 4, 64, 8),
    ],
)
def test_a_refit_takes_what_the_formula_says(
    stream: int, mlp: int, kv_heads: int, windows: int, batch_size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=50,
        hidden_size=stream,
        intermediate_size=mlp,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    plan = full_plan(model, "base")
    narrow = cut(model, plan)
    windows_WT = torch.randint(50, (windows, 64))
    weights = [*model.parameters(), *model.buffers(), *narrow.parameters(), *narrow.buffers()]
    with LiveBytes([*weights, windows_WT]) as live:
        refit(model, narrow, plan, windows_WT, Refit(batch_size=batch_size))
    predicted = refit_bytes(config, windows, 64, dtype, batch_size)
    assert live.peak <= predicted <= 1.25 * live.peak
