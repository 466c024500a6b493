"""What all tests share: shapes are checked, one thread, and the place of the large data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# From here on, the shapes and types in the signatures of the maths are checked at every call.
install_import_hook("secateur.pruning", "beartype.beartype")

# Small tensors gain nothing from threads, and sums keep one order.
torch.set_num_threads(1)


@pytest.fixture
def data() -> Path:
    """The folder of models and texts that are too large for the repository."""
    folder = os.environ.get("SECATEUR_DATA")
    if not folder:
        pytest.skip("SECATEUR_DATA is not set: it names the folder of models and texts")
    return Path(folder)
