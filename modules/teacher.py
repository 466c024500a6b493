"""The teacher model of distillation, and the states and tokens that a loss counts.

Legend: B = windows of a batch, T = tokens of a window, N = predictions that count, D = model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.modules.language_modelling import LanguageModelling
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.losses import Head, head_of


class Teacher:
    """A frozen model outside the module that learns from it: not trained or saved with it.

    Args:
        base: The teacher model.
    """

    def __init__(self, base: BaseModel) -> None:
        self.base, self.name = base, base.name
        self.model: PreTrainedModel | None = None
        self._states: Any = None

    def load(self, student: LanguageModelling) -> None:
        """Read the model in the type of its files, sharded if the student's strategy shards it.

        Args:
            student: The module that learns from it.

        Raises:
            ValueError: Its vocabulary differs.
        """
        model = student.read_model(self.base, "auto")
        theirs, ours = model.config.vocab_size, student.model.config.vocab_size
        if theirs != ours:
            raise ValueError(
                f"`teacher` {str(self.name)!r} has a vocabulary of {theirs} tokens and the model "
                f"one of {ours}; distillation needs the same."
            )
        model.requires_grad_(False)
        model.eval()
        self.model, self._states = model, student.fetching(_PredictingStates(model))

    @torch.no_grad()
    def __call__(self, input_BT: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, Head]:
        """Hidden states of windows, as from `predicting_states`, and the output head."""
        assert self.model is not None
        return self._states(input_BT, mask_BT), head_of(self.model)


class _PredictingStates(nn.Module):
    """`predicting_states` of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return predicting_states(self.model, input_BT, mask_BT)


def predicting_states(model: Any, input_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Last hidden states that predict the tokens that count, shape (N, D).

    Args:
        model: The model.
        input_BT: Token ids.
        mask_BT: Which of them count as predictions (bool); None for all. The first of a window
            never does.
    """
    hidden_BTD: Tensor = model.get_decoder()(input_ids=input_BT, use_cache=False).last_hidden_state
    return _chosen(hidden_BTD[:, :-1], mask_BT)


def predicted_tokens(input_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """The tokens that the states of `predicting_states` predict, shape (N,)."""
    return _chosen(input_BT[:, 1:], mask_BT)


def _chosen(of_places: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Of values (B, T - 1, ...), those whose next token counts."""
    return of_places.flatten(0, 1) if mask_BT is None else of_places[mask_BT[:, 1:]]
