"""The axis of compensation: change what stays of a model to make up for what was removed.

Legend: N = windows, T = tokens of a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.plan import Plan


class ModelCompensation(ABC):
    """Change the weights of a smaller model so that it is closer to the dense one."""

    @abstractmethod
    def check(self, model: PreTrainedModel, units: Sequence[Any], tokens: int) -> None:
        """Refuse what does not suit the method, before anything is spent.

        Args:
            model: The dense model, live or on the meta device.
            units: Blocks or halves of blocks that may be removed.
            tokens: Tokens of calibration text.

        Raises:
            ValueError: The method does not suit the model or the units, or needs more text.
        """

    @abstractmethod
    def __call__(
        self,
        dense: PreTrainedModel,
        smaller: PreTrainedModel,
        plan: Plan,
        windows_NT: Int[Tensor, "N T"],
    ) -> dict[str, Any]:
        """Change a smaller model, in place; return facts to record, JSON values.

        Args:
            dense: The model that the smaller one was made from; it is not changed.
            smaller: The smaller model.
            plan: What it has kept of the dense model.
            windows_NT: Token ids of calibration text.

        Raises:
            ValueError: The text or the model does not suit the method.
        """
