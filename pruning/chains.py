"""Steps that are refused on some kinds of base model; all others are allowed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum, auto

from transformers import PreTrainedConfig

from secateur.pruning.modelling import is_narrow


class Kind(Enum):
    """Properties by which a base model differs from a stock one; several may apply."""

    PACKED = auto()
    """Its weights are stored quantised."""
    NARROW = auto()
    """Its blocks have different widths."""
    PATTERNED = auto()
    """N of every M of its weights are zero."""


class Step(Enum):
    """A step that may be applied to a base model."""

    WIDTHS = auto()
    UNIFORM_WIDTHS = auto()
    BLOCKS = auto()
    WEIGHTS = auto()
    TRAINING = auto()


_WIDTHS_OF_PACKED = (
    "`base` is stored quantised and cannot be cut. Give the original weights; `quantisation` "
    "FourBit packs them while masks are learned."
)
_WIDTHS_OF_PATTERNED = (
    "`base` has zeros in a pattern (N:M, see its secateur.json), and cutting widths would destroy "
    "the pattern. Learn widths on the model before that pruning, then prune weights."
)

REFUSED: Mapping[tuple[Kind, Step], str] = {
    (Kind.PACKED, Step.WIDTHS): _WIDTHS_OF_PACKED,
    (Kind.PACKED, Step.UNIFORM_WIDTHS): _WIDTHS_OF_PACKED,
    (Kind.PACKED, Step.BLOCKS): (
        "The model is quantised (`quantization_config`): score blocks on it, and remove them from "
        "the original checkpoint, as prune_blocks does."
    ),
    (Kind.PACKED, Step.WEIGHTS): (
        "The model is quantised: single weights cannot be set to zero. Prune the original "
        "checkpoint, then quantise."
    ),
    (Kind.PACKED, Step.TRAINING): (
        "`base` is stored quantised, and packed numbers can be neither trained nor exported. Give "
        "the original weights; `lora` saves most of the memory."
    ),
    (Kind.NARROW, Step.UNIFORM_WIDTHS): (
        "`uniform` leaves a stock model, and `base` has widths per block, which no stock model "
        "has; set `uniform` to false."
    ),
    (Kind.PATTERNED, Step.WIDTHS): _WIDTHS_OF_PATTERNED,
    (Kind.PATTERNED, Step.UNIFORM_WIDTHS): _WIDTHS_OF_PATTERNED,
}
"""Kind of base model and refused step, to the reason and the cure."""


def kinds_of(config: PreTrainedConfig) -> set[Kind]:
    """The kinds that a configuration shows."""
    packed = getattr(config, "quantization_config", None) is not None
    found = {Kind.PACKED: packed, Kind.NARROW: is_narrow(config.model_type)}
    return {kind for kind, there in found.items() if there}


def refuse(kinds: Collection[Kind], step: Step) -> None:
    """Refuse a step that the table excludes.

    Args:
        kinds: Kinds of the base model.
        step: The intended step.

    Raises:
        ValueError: The table excludes the step; gives the reason.
    """
    for kind in Kind:
        if kind in kinds and (kind, step) in REFUSED:
            raise ValueError(REFUSED[kind, step])
