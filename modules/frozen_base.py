"""A frozen base model: data type, packing, and disabling of dropout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from secateur.modules.quantisation import Quantisation


@dataclass(frozen=True)
class FrozenBase:
    """How the frozen base model is kept in memory.

    Args:
        dtype: Type of the frozen weights: "auto" is that of the files, else a torch name such
            as "bfloat16".
        quantisation: Packs the frozen weights while masks are learned, `FourBit` or `EightBit`; the
            export cuts the original ones. None leaves them unchanged.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third
            more time. On in the recipes for 7B and larger.
        loss_chunk_tokens: Tokens whose logits are in memory at once, 1 or more.

    Raises:
        ValueError: `loss_chunk_tokens` is below 1.
    """

    dtype: str = "auto"
    quantisation: Quantisation | None = None
    gradient_checkpointing: bool = False
    loss_chunk_tokens: int = 512

    def __post_init__(self) -> None:
        if self.loss_chunk_tokens < 1:
            raise ValueError(
                f"`loss_chunk_tokens` must be 1 or more, got {self.loss_chunk_tokens}."
            )


def freeze(model: nn.Module) -> None:
    """Disable gradients of the weights and dropout: the gates are the only noise."""
    model.requires_grad_(False)
    model.train()  # gradient checkpointing works in training mode only
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
