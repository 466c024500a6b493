from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.shares import flat_range, read_shares
from tests.tiny import tiny_folder


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 2, 4)])
def test_a_range_of_a_tensor_in_a_file(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        for start in range(tensor.numel()):
            for stop in range(start + 1, tensor.numel() + 1):
                found = flat_range(file.get_slice("x"), start, stop)
                assert torch.equal(found, tensor.flatten()[start:stop])


@pytest.mark.parametrize("tied", [False, True])
def test_shares_of_all_ranks_make_the_model(tied: bool, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, tie_word_embeddings=tied)
    model, num_ranks = BaseModel(folder).load(), 4
    shares: dict[nn.Parameter, list[Tensor]] = {}
    for rank in range(num_ranks):

        def share(parameter: nn.Parameter, rank: int = rank) -> tuple[Tensor, int]:
            size = -(-parameter.numel() // num_ranks)  # the last one is padded
            shares.setdefault(parameter, []).append(torch.zeros(size))
            return shares[parameter][-1], rank * size

        read_shares(model, BaseModel(folder), share)
    for parameter in model.parameters():
        whole = torch.cat(shares[parameter])[: parameter.numel()]
        assert torch.equal(whole.view_as(parameter), parameter)


def test_a_file_that_lacks_a_tensor_or_has_another_size_is_named(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)

    def share(parameter: nn.Parameter) -> tuple[Tensor, int]:
        return parameter.view(-1), 0

    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no tensor bias"):
        read_shares(model, BaseModel(tmp_path), share)
    save_file({"weight": torch.zeros(4, 3), "bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has 12 entries in weight.* implies 6"):
        read_shares(model, BaseModel(tmp_path), share)
