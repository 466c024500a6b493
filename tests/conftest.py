"""What all tests share: shapes are checked, one thread, and the place of the large data."""

from __future__ import annotations

import os
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
from jaxtyping import install_import_hook

import secateur.pruning

# From here on, the shapes and types in the signatures of the maths are checked at every call, but
# for those of the code of models, which transformers calls as it likes.
_SCIENCE = {module.name for module in iter_modules(secateur.pruning.__path__)} - {"modelling"}
install_import_hook([f"secateur.pruning.{name}" for name in sorted(_SCIENCE)], "beartype.beartype")

# Small tensors gain nothing from threads, and sums keep one order.
torch.set_num_threads(1)


@pytest.fixture
def data() -> Path:
    """The folder of models and texts that are too large for the repository."""
    folder = os.environ.get("SECATEUR_DATA")
    if not folder:
        pytest.skip("SECATEUR_DATA is not set: it names the folder of models and texts")
    return Path(folder)
