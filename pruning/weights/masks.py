"""The masks of a model: which weights are kept. One bit per weight on disk.

Masks are needed after the pruning: training re-applies them after every step, checkpoints store
them, and an export is checked against them.

Legend: O = output features, I = input features, P = bytes of a packed mask.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_FORMAT = "secateur-masks-1"
FILE = "masks.safetensors"


def pack(mask_OI: Bool[Tensor, "O I"]) -> UInt8[Tensor, " P"]:
    """Pack eight entries per byte, row by row, the first one in the highest bit."""
    return torch.from_numpy(np.packbits(mask_OI.cpu().numpy()))


def unpack(packed_P: UInt8[Tensor, " P"], shape: tuple[int, int]) -> Bool[Tensor, "O I"]:
    """The inverse of `pack`."""
    bits = np.unpackbits(packed_P.cpu().numpy(), count=shape[0] * shape[1])
    return torch.from_numpy(bits.astype(bool)).view(shape)


class WeightMasks:
    """The masks of the weights of a model, one bit per weight.

    Masks are indexed by the names of parameters: `masks["model.layers.0.mlp.up_proj.weight"]` is a
    bool tensor (O, I), True for kept weights, on the CPU.
    """

    def __init__(self) -> None:
        self._packed: dict[str, tuple[Tensor, tuple[int, int]]] = {}

    def add(self, name: str, mask_OI: Bool[Tensor, "O I"]) -> None:
        """Add the mask of a parameter, or replace it."""
        self._packed[name] = pack(mask_OI), (mask_OI.shape[0], mask_OI.shape[1])

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._packed))  # the same order, whether made in one run or in two

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, name: str) -> Bool[Tensor, "O I"]:
        return unpack(*self._packed[name])

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set every removed weight of a live model to zero.

        Raises:
            ValueError: The model lacks a parameter, or it has another shape.
        """
        for name, parameter in self._parameters(model):
            parameter.masked_fill_(~self[name].to(parameter.device), 0)

    @torch.no_grad()
    def lost(self, model: nn.Module) -> dict[str, int]:
        """Parameter name to the number of removed weights that are not zero, if there are any.

        Raises:
            ValueError: The model lacks a parameter, or it has another shape.
        """
        counts = {
            name: int((parameter[~self[name].to(parameter.device)] != 0).sum())
            for name, parameter in self._parameters(model)
        }
        return {name: count for name, count in counts.items() if count}

    def save(self, folder: str | Path) -> None:
        """Write `masks.safetensors` into a folder, which is created if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {name: shape for name, (_, shape) in self._packed.items()}
        description = json.dumps({"format": _FORMAT, "shapes": shapes}, sort_keys=True)
        packed = {name: packed_P for name, (packed_P, _) in self._packed.items()}
        save_file(packed, folder / FILE, metadata={"masks": description})

    @classmethod
    def load(cls, folder: str | Path) -> WeightMasks:
        """Read masks.

        Raises:
            ValueError: The folder holds no masks, or damaged ones.
        """
        path = Path(folder) / FILE
        masks = cls()
        try:
            with safe_open(path, framework="pt") as file:
                description = json.loads((file.metadata() or {}).get("masks", "{}"))
                if description.get("format") != _FORMAT:
                    raise ValueError(f"{path} is not of format {_FORMAT!r}.")
                for name, (rows, columns) in description["shapes"].items():
                    masks._packed[name] = file.get_tensor(name), (rows, columns)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no readable masks: {error}") from error
        return masks

    def _parameters(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(model.named_parameters())
        for name, (_, shape) in self._packed.items():
            parameter = parameters.get(name)
            if parameter is None or tuple(parameter.shape) != shape:
                found = "lacks it" if parameter is None else f"has {tuple(parameter.shape)}"
                raise ValueError(
                    f"The mask of {name} has shape {shape}, the model {found}; these are the masks "
                    "of another model."
                )
            yield name, parameter
