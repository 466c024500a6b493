"""Recompute activations in the backward pass instead of keeping them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from transformers import PreTrainedModel

from secateur.pruning.widths.gate_hooks import GateHooks


def recompute(model: PreTrainedModel, hooks: GateHooks | None = None) -> None:
    """Switch on gradient checkpointing, block by block.

    Args:
        model: The model.
        hooks: Gates of the model: the gates of the forward pass are used again when a block is
            recomputed.
    """
    # Renamed in transformers 5.23, which deprecates the old name.
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    enable: Any = getattr(model, new if hasattr(model, new) else old)
    settings: dict[str, Any] = {"use_reentrant": False}
    if hooks is not None:
        settings["context_fn"] = lambda: (nullcontext(), hooks.applied(hooks.gates, hooks.gains))
    enable(settings)
