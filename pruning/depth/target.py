"""How much to remove, measured in blocks, parameters or FLOPs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from secateur.pruning.depth.units import Unit
from secateur.pruning.families import family_of, skeleton
from secateur.pruning.measure.sizes import count

CONTEXT_TOKENS = 2048


@dataclass(frozen=True)
class Fractions:
    """Fractions of a model that units make up, each in [0, 1).

    Args:
        blocks: Fraction of the blocks; a half counts one half.
        parameters: Fraction of all parameters, embeddings included, tied ones once.
        flops: Fraction of the forward operations per token: blocks, attention scores, output head.
    """

    blocks: float
    parameters: float
    flops: float


def fractions(
    config: PreTrainedConfig, units: Sequence[Unit], context_tokens: int = CONTEXT_TOKENS
) -> Fractions:
    """Fractions of the model that units make up together, from its configuration.

    Args:
        config: Configuration of the model before any removal.
        units: The units.
        context_tokens: Tokens that a query attends to, 1 or more; used for the FLOPs.
    """
    each = fractions_of_each(config, units, context_tokens)
    return Fractions(
        blocks=sum(own.blocks for own in each),
        parameters=sum(own.parameters for own in each),
        flops=sum(own.flops for own in each),
    )


def fractions_of_each(
    config: PreTrainedConfig, units: Sequence[Unit], context_tokens: int = CONTEXT_TOKENS
) -> list[Fractions]:
    """Fractions of the model that each unit makes up; see `fractions`."""
    family, model = family_of(config), skeleton(config)
    blocks, total = model.get_submodule(family.blocks), count(model)
    attention_output = next(p.path for p in family.projections if p.output == "attn_out")
    found = []
    for unit in units:
        flops = 0
        for linear in unit.linears(blocks, family):
            flops += 2 * linear.weight.numel()
            flops += linear.bias.numel() if linear.bias is not None else 0
        block = blocks.get_submodule(str(unit.block))
        if unit.part != "mlp" and family.has(block, "attn"):
            width = block.get_submodule(attention_output).in_features
            flops += 4 * context_tokens * int(width)  # type: ignore[arg-type]
        parameters = sum(tensor.numel() for _, tensor in unit.tensors(blocks, family))
        found.append(
            Fractions(
                blocks=unit.num_blocks / config.num_hidden_layers,
                parameters=parameters / total.parameters,
                flops=flops / total.flops_per_token(context_tokens),
            )
        )
    return found


class Target(ABC):
    """How much to remove: the fewest units, in the order of a search, that reach `goal`."""

    @property
    @abstractmethod
    def goal(self) -> float:
        """The amount to remove, in the units of `sizes`."""

    @abstractmethod
    def sizes(self, config: PreTrainedConfig, units: Sequence[Unit]) -> list[float]:
        """The size of each unit."""

    def reached(self, sizes: Sequence[float]) -> bool:
        """Test whether units of these sizes are enough."""
        return sum(sizes) >= self.goal * (1 - 1e-9)


@dataclass(frozen=True)
class _Count(Target):
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"`count` must be 1 or more, got {self.count}.")

    @property
    def goal(self) -> float:
        return float(self.count)


@dataclass(frozen=True)
class Blocks(_Count):
    """A number of blocks; two halves are one.

    Args:
        count: Blocks to remove, 1 or more.

    Raises:
        ValueError: A setting is outside its range.
    """

    def sizes(self, config: PreTrainedConfig, units: Sequence[Unit]) -> list[float]:
        return [unit.num_blocks for unit in units]


@dataclass(frozen=True)
class UnitCount(_Count):
    """A number of units: blocks, or halves if these are removed one by one.

    Args:
        count: Units to remove, 1 or more.

    Raises:
        ValueError: A setting is outside its range.
    """

    def sizes(self, config: PreTrainedConfig, units: Sequence[Unit]) -> list[float]:
        return [1.0] * len(units)


@dataclass(frozen=True)
class _Fraction(Target):
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"`fraction` must be in (0, 1), got {self.fraction}.")

    @property
    def goal(self) -> float:
        return self.fraction


@dataclass(frozen=True)
class BlockFraction(_Fraction):
    """At least a fraction of the blocks.

    Args:
        fraction: Fraction of the blocks to remove, in (0, 1).

    Raises:
        ValueError: A setting is outside its range.
    """

    def sizes(self, config: PreTrainedConfig, units: Sequence[Unit]) -> list[float]:
        return [own.blocks for own in fractions_of_each(config, units)]


@dataclass(frozen=True)
class ParameterFraction(_Fraction):
    """At least a fraction of all parameters of the model.

    Args:
        fraction: Fraction of the parameters to remove, in (0, 1); embeddings cannot be removed.

    Raises:
        ValueError: A setting is outside its range.
    """

    def sizes(self, config: PreTrainedConfig, units: Sequence[Unit]) -> list[float]:
        return [own.parameters for own in fractions_of_each(config, units)]


@dataclass(frozen=True)
class FlopsFraction(_Fraction):
    """At least a fraction of the forward operations per token of the whole model.

    Args:
        fraction: Fraction of the FLOPs to remove, in (0, 1); those of the output head cannot be.
        context_tokens: Tokens that a query attends to, 1 or more.

    Raises:
        ValueError: A setting is outside its range.
    """

    context_tokens: int = CONTEXT_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context_tokens < 1:
            raise ValueError(f"`context_tokens` must be 1 or more, got {self.context_tokens}.")

    def sizes(self, config: PreTrainedConfig, units: Sequence[Unit]) -> list[float]:
        return [own.flops for own in fractions_of_each(config, units, self.context_tokens)]
