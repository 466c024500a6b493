"""Memory of the closed-form refit, by a formula.

While a block is refitted, five numbers per token and entry of the residual stream are kept: dense
and narrow stream, both outputs of attention, and the dense stream after the block. The largest
solution takes 3.5 matrices K x K and 5 matrices O x K of float64, K inputs and O outputs of a
layer; a batch takes 3 vectors of the MLP and 4 of the stream per token.

Held to tracked storages on random Llamas of widths 64 and 128: 3 to 15 % above (`LiveBytes`).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig

from secateur.pruning.blocks.refit import Refit
from secateur.pruning.families import blocks_of, family_of, skeleton


def refit_bytes(
    config: PreTrainedConfig,
    windows: int,
    window_tokens: int,
    dtype: torch.dtype,
    batch_size: int = Refit().batch_size,
) -> int:
    """Predict the peak memory of a refit beside the weights of both models, bytes.

    Widths are those of the dense model, which a narrow one does not exceed.

    Args:
        config: Configuration of the dense model.
        windows: Calibration windows, 1 or more.
        window_tokens: Tokens of a window, 1 or more.
        dtype: Type of the model.
        batch_size: Windows that a block sees at once, 1 or more.
    """
    model = skeleton(config)
    block = blocks_of(model, family_of(config))[0]
    layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
    stream: int = config.hidden_size
    widest = max(layer.in_features for layer in layers)
    all_windows = windows * window_tokens * stream * dtype.itemsize
    solution = max(
        round(8 * layer.in_features * (3.5 * layer.in_features + 5 * layer.out_features))
        for layer in layers
    )
    batch = min(batch_size, windows) * window_tokens * (3 * widest + 4 * stream) * dtype.itemsize
    return 5 * all_windows + solution + batch
