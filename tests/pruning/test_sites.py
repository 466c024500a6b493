from __future__ import annotations

import torch

from secateur.pruning.families import FAMILIES, skeleton
from secateur.pruning.sites import Site, find_sites, split
from tests.tiny import tiny_llama_config


def test_order_and_sizes() -> None:
    sites = find_sites(skeleton(tiny_llama_config(num_hidden_layers=2)), FAMILIES["llama"])
    block = [("attn_in", 24), ("attn_out", 24), ("mlp_in", 24), ("mlp_mid", 37), ("mlp_out", 24)]
    assert sites == [Site(index, *row) for index in range(2) for row in block]
    assert sites[8].key == "1.mlp_mid"


def test_a_head_size_of_its_own_does_not_change_the_sites() -> None:
    sites = find_sites(skeleton(tiny_llama_config(head_dim=10)), FAMILIES["llama"])
    assert sites == find_sites(skeleton(tiny_llama_config()), FAMILIES["llama"])


def test_split_is_the_inverse_of_concatenation() -> None:
    sites = [Site(0, "a", 2), Site(0, "b", 3), Site(1, "a", 1)]
    vector = torch.arange(6.0)
    parts = split(vector, sites)
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3, 4], [5]]
    assert torch.equal(torch.cat(parts), vector)
