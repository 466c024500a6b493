"""The model that another one is distilled from."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modules.loading import load_model, resolve
from modules.losses import Head, head_of
from pruning.fingerprint import fingerprint


class Teacher:
    """A frozen model, no part of the module that learns from it: not trained, saved or sharded.

    Args:
        name: A folder or a hub id.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: PreTrainedModel | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of the model."""
        return fingerprint(resolve(self.name))

    def load(self, vocab_size: int) -> None:
        """Read the model, in the type of its files.

        Args:
            vocab_size: Entries of the vocabulary of the model that learns.

        Raises:
            ValueError: Its vocabulary is another one.
        """
        model = load_model(resolve(self.name))
        if (theirs := model.config.vocab_size) != vocab_size:
            raise ValueError(
                f"`teacher` {self.name!r} has a vocabulary of {theirs} and the model one of "
                f"{vocab_size}; distillation needs the same."
            )
        model.requires_grad_(False)
        model.eval()
        self.model = model

    @torch.no_grad()
    def __call__(self, input_BT: Tensor) -> tuple[Tensor, Head]:
        """What it says of windows: hidden states as `predicting_states` gives, and the head."""
        assert self.model is not None
        return predicting_states(self.model, input_BT), head_of(self.model)


def predicting_states(model: Any, input_BT: Tensor) -> Tensor:
    """Last hidden states that predict the next tokens, shape (B * (T - 1), D)."""
    output = model.get_decoder()(input_ids=input_BT, use_cache=False)
    hidden_ND: Tensor = output.last_hidden_state[:, :-1].flatten(0, 1)
    return hidden_ND
