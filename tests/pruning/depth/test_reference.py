"""What the reference programs gave on a real model; needs the large data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from secateur.pruning.depth import BlockInfluence, Perplexity, Taylor

PERPLEXITY = [8893.2, 114.18, 105.93, 104.58, 101.68, 106.29, 103.18, 127.60]
TAYLOR = [10.542, 5.415, 5.730, 6.096, 6.316, 7.108, 7.664, 7.641]
# The last one is left out: it was taken after the final norm there.
INFLUENCE = [0.9730, 0.0984, 0.0635, 0.0599, 0.0508, 0.0545, 0.0576]


def test_scores_and_orders_of_the_reference(data: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(data / "models" / "llama7m")
    windows = np.load(data / "reference" / "calib_10x128.npy")
    windows_NT = torch.from_numpy(windows).long()
    for score, expected, order in (
        (Perplexity(), PERPLEXITY, [4, 6, 3, 2, 5, 1, 7, 0]),
        (Taylor(), TAYLOR, [1, 2, 3, 4, 5, 7, 6, 0]),
        (BlockInfluence(), INFLUENCE, None),
    ):
        found = score(model, windows_NT).values
        np.testing.assert_allclose(found[: len(expected)], expected, rtol=1e-3)
        if order is not None:
            assert found.argsort().tolist() == order
