from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from secateur.pruning.export.gathered_weights import num_parameters, write_gathered
from secateur.pruning.export.sources import rounded
from secateur.pruning.lora import LoRA, merged
from tests.runs import content
from tests.tiny import tiny_llama


@contextmanager
def on_one_rank(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Everything is whole here."""
    yield


@pytest.mark.parametrize("shard_bytes", [20_000, 5_000_000_000])
@pytest.mark.parametrize("tied", [False, True])
def test_the_files_are_those_of_transformers(tied: bool, shard_bytes: int, tmp_path: Path) -> None:
    """Byte for byte: updates added up, tied tensors once, another type, several files."""
    model = tiny_llama(tie_word_embeddings=tied)
    parameters = model.num_parameters()
    LoRA(rank=2).inject(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    (tmp_path / "ours").mkdir()
    write_gathered(model, tmp_path / "ours", torch.bfloat16, on_one_rank, shard_bytes)
    with merged(model), rounded(model, torch.bfloat16):
        model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    files = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes > 1e6 else len(files) > 1
    assert num_parameters(model) == parameters


@pytest.mark.parametrize("writes", [True, False])
def test_every_rank_gathers_to_the_end_though_one_cannot_write(
    writes: bool, tmp_path: Path
) -> None:
    gathered: list[nn.Parameter] = []

    @contextmanager
    def noting(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        gathered.extend(parameters)
        yield

    model = tiny_llama()
    if writes:
        with pytest.raises(SafetensorError, match="No such file"):
            write_gathered(model, tmp_path / "gone", torch.float32, noting, 1)
    else:
        write_gathered(model, None, torch.float32, noting)
    assert len(gathered) == len(list(model.parameters()))


def test_a_nan_weight_is_not_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(OSError, match="does not contain 'lm_head.weight' as it was written"):
        write_gathered(model, tmp_path, torch.float32, on_one_rank)
