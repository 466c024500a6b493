"""Perplexity of a causal language model on windows of tokens.

The loss is shifted inside each window: T tokens give T - 1 predictions; windows are independent.
Perplexity is exp of the mean negative log-likelihood over all predictions.

Legend: N = windows, T = tokens of a window, B = windows of a batch, P = predictions of a chunk,
V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruning.modes import evaluation
from secateur.pruning.progress import tracked

_CHUNK = 1024  # predictions with fp32 logits in memory at once: 128 MiB at a vocabulary of 32k


@dataclass(frozen=True)
class MeasuredPerplexity:
    """Perplexity of a text, with its standard error.

    Args:
        value: Perplexity, exp(mean_nll), 1 or more.
        mean_nll: Mean negative log-likelihood of a prediction, nats.
        standard_error: Standard error of `mean_nll` over windows, nats; None for a single window.
        num_predictions: Tokens that were predicted.
    """

    value: float
    mean_nll: float
    standard_error: float | None
    num_predictions: int


def cut_windows(ids: Sequence[int] | Int[Tensor, " I"], window_tokens: int) -> Int[Tensor, "N T"]:
    """Non-overlapping windows in order; a remainder is dropped.

    Args:
        ids: Token ids of a text.
        window_tokens: Tokens of a window, 2 or more: one has nothing to predict.

    Returns:
        int64 of shape (len(ids) // window_tokens, window_tokens).

    Raises:
        ValueError: The window is too short, or longer than the text.
    """
    if window_tokens < 2:
        raise ValueError(f"`window_tokens` must be 2 or more, got {window_tokens}.")
    ids_I = torch.as_tensor(ids, dtype=torch.long)
    count = len(ids_I) // window_tokens
    if count == 0:
        raise ValueError(
            f"The text has {len(ids_I)} tokens, less than one window of `window_tokens` "
            f"{window_tokens}; give more text or shorten the window."
        )
    return ids_I[: count * window_tokens].view(count, window_tokens)


@torch.inference_mode()
def perplexity(
    model: Any, windows_NT: Int[Tensor, "N T"], batch_size: int = 8
) -> MeasuredPerplexity:
    """Measure a model, temporarily in evaluation mode.

    Args:
        model: A causal language model: called with `input_ids`, returns `.logits` (B, T, V).
        windows_NT: Token ids, from `cut_windows`.
        batch_size: Windows per forward pass, 1 or more; does not change the result.

    Raises:
        ValueError: There are no windows, a window has one token, or the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more, got {batch_size}.")
    num_windows, window_tokens = windows_NT.shape
    if num_windows == 0 or window_tokens < 2:
        raise ValueError(
            f"Windows must be 1 or more of 2 or more tokens, got {num_windows} of {window_tokens}."
        )
    device = next(model.parameters()).device
    with evaluation(model):
        nll_N = torch.cat(
            [
                window_nll(model, batch.to(device))
                for batch in tracked(windows_NT.split(batch_size), "Measuring perplexity")
            ]
        )
    return of_windows(nll_N, window_tokens)


def of_windows(nll_N: Float[Tensor, " N"], window_tokens: int) -> MeasuredPerplexity:
    """Perplexity from the mean negative log-likelihood of each window, see `window_nll`.

    Args:
        nll_N: One value per window, nats, float64.
        window_tokens: Tokens of every window.
    """
    count = len(nll_N)
    mean = float(nll_N.mean())  # equal lengths: also the mean over predictions
    error = float(nll_N.std()) / math.sqrt(count) if count > 1 else None
    value = float(nll_N.mean().exp())
    return MeasuredPerplexity(value, mean, error, count * (window_tokens - 1))


def window_nll(model: Any, input_BT: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Mean negative log-likelihood of each window, float64 on the CPU."""
    logits_BTV = model(input_ids=input_BT, use_cache=False).logits
    nll_P = [
        F.cross_entropy(logits_PV.float(), target_P, reduction="none")
        for logits_TV, input_T in zip(logits_BTV, input_BT, strict=True)
        for logits_PV, target_P in zip(
            logits_TV[:-1].split(_CHUNK), input_T[1:].split(_CHUNK), strict=True
        )
    ]
    return torch.cat(nll_P).double().view(len(input_BT), -1).mean(1).cpu()
