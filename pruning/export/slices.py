"""Slices of a plan: new name, kept entries and gains of every tensor of a model.

Used both for streamed checkpoints and for live models.

Legend: W = kept entries of a site, or their features, F = features on one side of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from secateur.pruning.families import PARTS
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.headers import read_tensor
from secateur.pruning.files.model_folder import in_block
from secateur.pruning.files.tensors import Made
from secateur.pruning.heads import HEADS
from secateur.pruning.plan import Plan
from secateur.pruning.sites import features_of


@dataclass(frozen=True)
class Slice:
    """The kept entries of one tensor.

    Args:
        name: Name of the tensor in the smaller model.
        shape: Its shape there.
        indices: Kept features (int64, shape (W,)) along each of its first axes; None keeps all.
        gains: Factors of the uncut tensor, shape (F,), along each of its first axes.
    """

    name: str
    shape: tuple[int, ...]
    indices: tuple[Tensor | None, ...]
    gains: tuple[Tensor, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """Cut a tensor; the result has its type and shares no memory with it."""
        dtype, device, gains, smaller = tensor.dtype, tensor.device, list(self.gains), tensor
        for axis, index_W in enumerate(self.indices):
            if index_W is not None:
                smaller = smaller.index_select(axis, index_W.to(device))
                if gains:
                    gains[axis] = gains[axis][index_W]
        for axis, gain_F in enumerate(gains):  # rounded once, at the end
            shape = [-1 if a == axis else 1 for a in range(tensor.dim())]
            smaller = smaller.float() * gain_F.to(device).view(shape)
        return tensor.clone() if smaller is tensor else smaller.to(dtype)


class Slices:
    """Slices of all tensors of the model that a plan leaves.

    Args:
        plan: The kept indices.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._family = plan, plan.family
        self._sizes = {(site.block, site.name): site.size for site in plan.sites}
        self._kept = {
            (site.block, site.name): index_W if len(index_W) < site.size else None
            for site, index_W in zip(plan.sites, plan.kept, strict=True)
        }
        self._places = {block: place for place, block in enumerate(plan.kept_blocks())}

    def of(self, name: str, shape: Sequence[int]) -> Slice | None:
        """The slice of a tensor; None if the tensor is removed.

        Args:
            name: Name of the tensor in the base model.
            shape: Its shape there.

        Raises:
            ValueError: The shape does not fit the sites of the plan.
        """
        block, relative = in_block(self._family, name)
        if block >= 0 and not self._stays(block, relative):
            return None
        indices, smaller = [], list(shape)
        for axis, site in enumerate(self._family.axes(relative)):
            index_W = None if site is None else self._kept[block, site]
            if site is not None and not self._fits(shape[axis : axis + 1], block, site):
                raise ValueError(
                    f"{name!r} has shape {list(shape)}, which does not fit site {block}.{site} of "
                    f"{self._sizes[block, site]} entries; is it quantised? Prune the original "
                    "checkpoint."
                )
            if site is not None and index_W is not None:
                index_W = features_of(index_W, self._sizes[block, site], shape[axis])
                smaller[axis] = len(index_W)
            indices.append(index_W)
        gains = self._plan.gains or {}
        axes = [f"{block}.{axis}" for axis in self._family.gain_axes(relative)]
        folded = tuple(
            gains.get(axis, torch.ones(length))
            for axis, length in zip(axes, shape, strict=False)
            if gains.keys() & set(axes)
        )
        return Slice(self._renamed(block, relative), tuple(smaller), tuple(indices), folded)

    def index_buffers(self) -> dict[str, Tensor]:
        """Name to content of the index buffers, for a base model that has none."""
        return {
            self._renamed(block, buffer): index_W
            for block in self._places
            for buffer, site in self._family.index_buffers.items()
            if (index_W := self._kept.get((block, site))) is not None and len(index_W) > 0
        }

    def _fits(self, lengths: Sequence[int], block: int, site: str) -> bool:
        """Test whether an axis of a tensor, if it is there, has the features of a site."""
        size = self._sizes[block, site]
        if site == HEADS:
            return len(lengths) == 1 and lengths[0] % size == 0
        return list(lengths) == [size]

    def _renamed(self, block: int, relative: str) -> str:
        return relative if block < 0 else f"{self._family.blocks}.{self._places[block]}.{relative}"

    def _stays(self, block: int, relative: str) -> bool:
        """Test whether a tensor of a block is part of the smaller model, cut or not."""
        part = self._family.part_of_tensor(relative)
        return any(self._plan.keeps(block, name) for name in ([part] if part else PARTS))


def cut_tensors(base: BaseModel, plan: Plan) -> list[tuple[Path, Made]]:
    """All tensors of the smaller model, with the files that they come from.

    Those of the base model come first, then the index buffers that it lacks.

    Raises:
        ValueError: The files of the base model do not fit the plan.
    """
    slices, found = Slices(plan), []
    for name, path in base.tensors.items():
        header = base.headers[name]
        try:
            own = slices.of(name, header.shape)
        except ValueError as error:
            raise ValueError(f"In {path}, {error}") from error
        if own is not None:
            make = partial(_read, path, name, own)
            found.append((path, Made(own.name, header.dtype, own.shape, make)))
    done = {made.name for _, made in found}
    for name, index_W in slices.index_buffers().items():
        if name not in done:
            made = Made(name, "I64", (len(index_W),), index_W.clone)
            found.append((base.folder, made))
    return found


def _read(path: Path, name: str, own: Slice) -> Tensor:
    return own.of(read_tensor(path, name))
