"""Keep masks on a live model in training: on gradients, weights and low-rank updates.

A low-rank update B A of a masked matrix is dense. Added to the matrix at the end, it would fill the
zeros again; masked only at the end, the exported model would differ from the trained one. So the
update is masked during training: W x + (mask * B A) x, as in SparsePEFT of SQFT (arXiv 2410.03750).

Memory: one byte per weight of the masked matrices; with low-rank updates also, until the backward
pass, one number per weight of each adapted matrix (with `gradient_checkpointing` only of one
block).

Legend: O = output features, I = input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.pruning.weights.masks import WeightMasks


class HeldMasks:
    """Masks that are kept on a model, low-rank updates included, until `release`.

    Args:
        model: The live model; its matrices may carry updates of the package peft.
        masks: The kept weights.

    Raises:
        ValueError: The model lacks a matrix, or it has another shape.
    """

    def __init__(self, model: nn.Module, masks: WeightMasks) -> None:
        self._removed: list[tuple[nn.Parameter, Tensor]] = []
        self._layers: list[tuple[Any, list[Any]]] = []
        for name, layer in _layers(model, masks):
            removed_OI = ~masks[name].to(layer.weight.device)
            if layer.weight.shape != removed_OI.shape:
                raise ValueError(
                    f"The mask of {name} has shape {tuple(removed_OI.shape)}, the model "
                    f"{tuple(layer.weight.shape)}; these are the masks of another model."
                )
            self._removed.append((layer.weight, removed_OI))
            if is_adapted(layer):
                self._layers.append((layer, _mask_updates(layer, removed_OI)))

    @torch.no_grad()
    def apply(self) -> None:
        """Set the removed weights to zero."""
        for weight, removed_OI in self._removed:
            weight.masked_fill_(removed_OI, 0)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of removed weights, so that neither moments nor clipping see them."""
        for weight, removed_OI in self._removed:
            if weight.grad is not None:
                weight.grad.masked_fill_(removed_OI, 0)

    def release(self) -> None:
        """Remove the masks from the updates."""
        for layer, handles in self._layers:
            del layer.get_delta_weight  # uncovers the method of the class
            for handle in handles:
                handle.remove()


def is_adapted(layer: nn.Module) -> bool:
    """Test whether a layer has a low-rank update."""
    return hasattr(layer, "get_delta_weight")


@torch.no_grad()
def take_out_updates(model: nn.Module, masks: WeightMasks) -> None:
    """Subtract low-rank updates from their weights: weight plus update is then as before.

    Args:
        model: Its adapted matrices hold the wanted sum of weight and update.
        masks: Names the matrices that are changed.
    """
    for _, layer in _layers(model, masks):
        if is_adapted(layer):
            (adapter,) = layer.lora_A
            update_OI = layer.get_delta_weight(adapter).float()
            layer.weight.copy_(layer.weight.float() - update_OI)


def _layers(model: nn.Module, masks: WeightMasks) -> Iterator[tuple[str, Any]]:
    for name in masks:
        try:
            yield name, model.get_submodule(name.removesuffix(".weight"))
        except AttributeError as error:
            raise ValueError(
                f"The model lacks {name}, which has a mask; these are the masks of another model."
            ) from error


def _mask_updates(layer: Any, removed_OI: Tensor) -> list[Any]:
    """Mask the update of a layer, in its forward pass and when it is merged."""
    (adapter,) = layer.lora_A
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    dense_update = layer.get_delta_weight
    read: list[Tensor] = []  # input of `down`, after dropout

    def note(module: nn.Module, args: tuple[Tensor]) -> None:
        read[:] = args

    def masked(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        update_OI = (up.weight @ down.weight).masked_fill(removed_OI, 0)
        return F.linear(read.pop(), update_OI)

    def masked_update(name: str) -> Tensor:
        update_OI: Tensor = dense_update(name)
        return update_OI.masked_fill(removed_OI, 0)

    layer.get_delta_weight = masked_update
    return [down.register_forward_pre_hook(note), up.register_forward_hook(masked)]
