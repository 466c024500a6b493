"""Which step may follow on which kind of base model; what is not in the table may."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum, auto

from transformers import PreTrainedConfig

from secateur.pruning.modelling import is_narrow


class Kind(Enum):
    """What a base model is beside a stock one; it may be several."""

    PACKED = auto()
    """Its weights are stored quantised."""
    NARROW = auto()
    """Its blocks have widths of their own."""
    PATTERNED = auto()
    """N of every M of its weights are zero."""


class Step(Enum):
    """What may be done to a base model."""

    WIDTHS = auto()
    UNIFORM_WIDTHS = auto()
    BLOCKS = auto()
    WEIGHTS = auto()


_WIDTHS_OF_PACKED = (
    "`base` is stored quantised, which cannot be cut. Give the original weights; `quantisation` "
    "FourBit packs them while masks are learned."
)
_WIDTHS_OF_PATTERNED = (
    "`base` has zeros in a pattern (N:M, see its secateur.json), and a narrower matrix would have "
    "them in none. Learn widths of the model from before, then prune weights."
)

REFUSED: Mapping[tuple[Kind, Step], str] = {
    (Kind.PACKED, Step.WIDTHS): _WIDTHS_OF_PACKED,
    (Kind.PACKED, Step.UNIFORM_WIDTHS): _WIDTHS_OF_PACKED,
    (Kind.PACKED, Step.BLOCKS): (
        "The model is quantised (`quantization_config`): score blocks on it, and remove them from "
        "the original checkpoint, as prune_blocks does."
    ),
    (Kind.PACKED, Step.WEIGHTS): (
        "The model is quantised: its numbers cannot be set to zero one by one. Prune the original "
        "checkpoint, then quantise."
    ),
    (Kind.NARROW, Step.UNIFORM_WIDTHS): (
        "`uniform` is there to leave a stock model, and no stock model has widths per block, as "
        "`base` has; set `uniform` to false."
    ),
    (Kind.PATTERNED, Step.WIDTHS): _WIDTHS_OF_PATTERNED,
    (Kind.PATTERNED, Step.UNIFORM_WIDTHS): _WIDTHS_OF_PATTERNED,
}
"""Kind of base model and step to the reason why not, and the cure."""


def kinds_of(config: PreTrainedConfig) -> set[Kind]:
    """What a configuration tells of a model."""
    packed = getattr(config, "quantization_config", None) is not None
    found = {Kind.PACKED: packed, Kind.NARROW: is_narrow(config.model_type)}
    return {kind for kind, there in found.items() if there}


def refuse(kinds: Collection[Kind], step: Step) -> None:
    """Refuse a step that leads nowhere.

    Args:
        kinds: What the base model is.
        step: What is to be done to it.

    Raises:
        ValueError: The table has a reason why not.
    """
    for kind in Kind:
        if kind in kinds and (kind, step) in REFUSED:
            raise ValueError(REFUSED[kind, step])
