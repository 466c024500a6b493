"""The axis of compensation: change what stays of a model to make up for what was removed.

Legend: N = windows, T = tokens of a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from secateur.pruning.plan import Plan


class ModelCompensation(ABC):
    """Change the weights of a smaller model so that it is closer to the dense one."""

    def refuse(self, config: PretrainedConfig, units: Sequence[Any]) -> str | None:
        """Why it does not suit a model from which units are removed; None if it does.

        Args:
            config: Configuration of the dense model.
            units: Blocks or halves of blocks that are removed.
        """
        return None

    def check(self, model: PreTrainedModel, tokens: int) -> None:  # noqa: B027 (often nothing)
        """Refuse too little text, before anything is spent.

        Args:
            model: The dense model, live or on the meta device.
            tokens: Tokens of calibration text.

        Raises:
            ValueError: It is too little for this model.
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
