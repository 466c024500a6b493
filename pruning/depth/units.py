"""Units of depth pruning: whole blocks, or the attention or MLP half of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.pruning.families import PARTS, Family, family_of, part_of


@dataclass(frozen=True, order=True)
class Unit:
    """A whole block, or one half of it, that can be removed.

    Args:
        block: Index of the block, 0 or more.
        part: The whole block, its attention, or its MLP.
    """

    block: int
    part: Literal["block", "attn", "mlp"] = "block"

    @property
    def key(self) -> str:
        """Name used in files and messages: `4`, `4.attn` or `4.mlp`."""
        return str(self.block) if self.part == "block" else f"{self.block}.{self.part}"

    @classmethod
    def of_key(cls, key: str) -> Unit:
        """The unit of a name, see `key`."""
        block, _, part = key.partition(".")
        return cls(int(block), part or "block")  # type: ignore[arg-type]

    @property
    def num_blocks(self) -> float:
        """Number of blocks: 1, or 0.5 for a half."""
        return 1.0 if self.part == "block" else 0.5

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the block that it is made of."""
        return PARTS if self.part == "block" else (self.part,)

    def tensors(self, blocks: nn.Module, family: Family) -> Iterator[tuple[str, nn.Parameter]]:
        """Names, relative to the list of blocks, and parameters of the unit.

        Args:
            blocks: The list of blocks of the model.
            family: Its row of the table.
        """
        inside = tuple(f"{path}." for path in self._stand_ins(family))
        for name, parameter in blocks.get_submodule(str(self.block)).named_parameters():
            if self.part == "block" or name.startswith(inside):
                yield f"{self.block}.{name}", parameter

    def linears(self, blocks: nn.Module, family: Family) -> Iterator[nn.Linear]:
        """The linear layers of the unit."""
        block = blocks.get_submodule(str(self.block))
        roots = [block]
        if self.part != "block":
            roots = [block.get_submodule(path) for path in self._stand_ins(family)]
        for root in roots:
            yield from (module for module in root.modules() if isinstance(module, nn.Linear))

    def replacements(
        self, blocks: nn.Module, family: Family
    ) -> Iterator[tuple[nn.Module, str, nn.Module | None]]:
        """Replacements that bypass the unit: parent, name of the child, new child."""
        if self.part == "block":
            yield blocks, str(self.block), _Skip()
            return
        for path, stand_in in self._stand_ins(family).items():
            parent, _, name = f"{self.block}.{path}".rpartition(".")
            yield blocks.get_submodule(parent), name, stand_in

    def is_in(self, blocks: nn.Module, family: Family) -> bool:
        """Test whether the unit exists and is not replaced."""
        block = blocks.get_submodule(str(self.block))
        if isinstance(block, _Silent):
            return False
        if self.part != "block" and not family.has(block, self.part):
            return False
        inside = (block.get_submodule(path) for path in self._stand_ins(family))
        return not any(isinstance(module, _Silent) for module in inside)

    def _stand_ins(self, family: Family) -> Mapping[str, nn.Module | None]:
        """Path inside the block to the replacement when a half is bypassed.

        A norm that both halves read belongs to neither and is kept. Narrow blocks support a missing
        half: it needs no replacement.
        """
        if self.part == "block":
            return {}
        norms = [norm.path for norm in family.norms if part_of(norm.output) == self.part]
        linears = [p.path for p in family.projections if p.part == self.part]
        # Attention and most MLPs are one child of the block; OPT has two layers instead.
        *before, last = dict.fromkeys(path.split(".")[0] for path in linears)
        if family.narrow:
            buffers = family.index_buffers.items()
            holders = [name.partition(".")[0] for name, s in buffers if part_of(s) == self.part]
            return dict.fromkeys([*norms, *before, last, *holders])
        modules: dict[str, nn.Module] = {name: nn.Identity() for name in (*norms, *before)}
        modules[last] = _NoAttention(self.block) if self.part == "attn" else _Nothing()
        return modules


class Units(ABC):
    """The kind of units that a search removes."""

    @abstractmethod
    def all(self, num_blocks: int) -> tuple[Unit, ...]:
        """All units of a model of a given number of blocks, first to last."""

    def of(self, model: PreTrainedModel) -> tuple[Unit, ...]:
        """The units of a model, first to last."""
        family = family_of(model.config)
        blocks = model.get_submodule(family.blocks)
        units = self.all(model.config.num_hidden_layers)
        return tuple(unit for unit in units if unit.is_in(blocks, family))


@dataclass(frozen=True)
class WholeBlocks(Units):
    """Whole blocks: the result is a stock model of its family."""

    def all(self, num_blocks: int) -> tuple[Unit, ...]:
        return tuple(Unit(block) for block in range(num_blocks))


@dataclass(frozen=True)
class HalfBlocks(Units):
    """Attention and MLP of every block, separately (BlockPruner, arXiv 2406.10594)."""

    def all(self, num_blocks: int) -> tuple[Unit, ...]:
        return tuple(Unit(block, part) for block in range(num_blocks) for part in ("attn", "mlp"))


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block or its attention."""
    found = args[0] if args else kwargs["hidden_states"]
    assert isinstance(found, Tensor)
    return found


class _Silent(nn.Module):
    """Base class of modules that replace a bypassed unit and add nothing to the residual stream."""


class _Skip(_Silent):
    """Replaces a block: returns its input."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return first_input(args, kwargs)


class _NoAttention(_Silent):
    """Replaces an attention: returns zeros, and stores one number per token in the cache.

    Caches count their tokens in the entry of the first block, so every block needs one.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        hidden_BTD = first_input(args, kwargs)
        if (cache := kwargs.get("past_key_values")) is not None:
            number_B1T1 = hidden_BTD.new_zeros(hidden_BTD.shape[0], 1, hidden_BTD.shape[1], 1)
            cache.update(number_B1T1, number_B1T1, self.layer_idx)
        return torch.zeros_like(hidden_BTD), None


class _Nothing(_Silent):
    """Replaces an MLP: returns zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)
