from __future__ import annotations

import pytest

from secateur.pruning.lora import LoRA, adapted
from tests.tiny import tiny_llama


def test_a_rank_above_that_of_the_layers_is_refused() -> None:
    """Widths 24 and 37: no update has a rank above 24."""
    with pytest.raises(ValueError, match="`rank` must be 24 or less, as every layer has, got 25"):
        LoRA(rank=25).inject(tiny_llama())
    model = tiny_llama()
    LoRA(rank=24).inject(model)  # of the keys, 8 x 24, too
    assert len(adapted(model)) == 3 * 7
