from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from modules import CausalLM, ShardedDDP, Zero
from tests.runs import NOISE, call, learn_masks, make_inputs

pytestmark = NOISE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 4}, "`stage` must be 1, 2 or 3, got 4"),
        ({"stage": 2, "offload_parameters": True}, "`offload_parameters` needs `stage` 3, got 2"),
        ({"stage": 1, "offload_optimizer": True}, "`offload_optimizer` needs `stage` 2 or 3"),
        ({"prefetch_parameters": -1}, "`prefetch_parameters` must be 0 or more, got -1"),
        ({"timeout_seconds": 0.0}, "`timeout_seconds` must be above 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Zero(**settings)


@pytest.mark.parametrize("strategy", [Zero(stage=3), ShardedDDP()])
def test_a_module_that_needs_the_whole_model_is_refused(strategy: Any) -> None:
    module = CausalLM(architecture={"model_type": "llama"})
    with pytest.raises(ValueError, match="CausalLM .* use .*stage.? 2"):
        strategy.connect(module)


def test_another_precision_is_refused_with_what_to_do(recwarn: pytest.WarningsRecorder) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=Zero(stage=2), precision="bf16-mixed", logger=False
    )
    with pytest.raises(ValueError, match="trains in float32.*bf16-mixed.*--model.dtype bfloat16"):
        trainer.strategy.setup_environment()


def test_training_goes_on_after_a_checkpoint(tmp_path: Path) -> None:
    """With heads that DeepSpeed would not keep whole by itself, and nothing before the checkpoint
    that gathers them: from the third step on it expects parameters in an order that it has noted.
    """
    make_inputs(tmp_path, intermediate_size=1024)
    line = call(
        [
            *learn_masks(tmp_path, tmp_path / "run", 4, ("SaveCheckpoint",), 3),
            "--trainer.logger=false",
            "--trainer.strategy=modules.Zero",
            "--trainer.strategy.stage=3",
            "--trainer.limit_val_batches=0",
        ]
    )
    assert max(p.ds_numel for p in line.model.whole_parameters()) > 100_000
    assert line.trainer.global_step == 4
