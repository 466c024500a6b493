from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import nn

from secateur.modules import CausalLM, MaskLearning, ShardedDDP, Zero


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 4}, "`stage` must be 1, 2 or 3, got 4"),
        ({"stage": 2, "offload_parameters": True}, "`offload_parameters` needs `stage` 3, got 2"),
        ({"stage": 1, "offload_optimizer": True}, "`offload_optimizer` needs `stage` 2 or 3"),
        ({"live_parameters": -1}, "`live_parameters` must be 0 or more, got -1"),
        ({"timeout_seconds": 0.0}, "`timeout_seconds` must be above 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Zero(**settings)


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        (
            Zero(stage=3),
            {"architecture": {"model_type": "llama"}},
            "from random weights. Use `stage` 2",
        ),
        (ShardedDDP(), {"base": "hub/model"}, "CausalLM trains its own; use Zero or DDP"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(
    strategy: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        strategy.connect(CausalLM(**settings))


def test_states_that_cannot_be_cut_are_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = nn.Linear(2, 2)
    optimizer = bitsandbytes.optim.AdamW8bit(layer.parameters())
    with pytest.raises(ValueError, match="`optimizer` AdamW8bit of bitsandbytes .*AdamW, .*or ddp"):
        Zero(stage=2)._setup_model_and_optimizer(layer, optimizer)


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy(stage=2), ModelParallelStrategy()])
@pytest.mark.parametrize(
    "module", [CausalLM(architecture={"model_type": "llama"}), MaskLearning("hub/model")]
)
def test_strategies_that_wrap_models_otherwise_are_refused(module: Any, strategy: Any) -> None:
    module._trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(ValueError, match="Use ddp .* Zero instead of deepspeed"):
        module.setup("fit")


def test_another_precision_is_refused_with_what_to_do(recwarn: pytest.WarningsRecorder) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=Zero(stage=2), precision="bf16-mixed", logger=False
    )
    with pytest.raises(
        ValueError, match="trains in float32.*bf16-mixed.*--model.frozen.dtype bfloat16"
    ):
        trainer.strategy.setup_environment()
