from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from secateur.pruning.depth import (
    HalfBlocks,
    Unit,
    WholeBlocks,
    bypassed,
    remove_blocks,
    shortened_config,
)
from tests.tiny import tiny_config, tiny_llama, tiny_llama_config, tiny_model


def test_two_removals_remember_the_blocks_of_the_first_model() -> None:
    model = tiny_llama(num_hidden_layers=6)
    remove_blocks(model, [4, 1], {"score": "BlockMagnitude()"})
    remove_blocks(model, [0])
    assert model.config.secateur == {
        "num_blocks": 6,
        "kept_blocks": [2, 3, 5],
        "removals": [{"blocks": [1, 4], "score": "BlockMagnitude()"}, {"blocks": [0]}],
    }


def test_a_model_that_shares_the_configuration_keeps_it() -> None:
    config = tiny_llama_config()
    ours, theirs = LlamaForCausalLM(config), LlamaForCausalLM(config)
    remove_blocks(ours, [1])
    assert (ours.config.num_hidden_layers, theirs.config.num_hidden_layers) == (2, 3)
    assert not hasattr(theirs.config, "secateur")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([3], "Block 3 is out of range: the model has 3 blocks, 0 to 2"),
        ([-1], "Block -1 is out of range"),
        ([1, 1], "Block 1 is named more than once"),
        ([0, 1, 2], "No block would remain of 3; remove at most 2"),
    ],
)
def test_blocks_that_cannot_go(blocks: list[int], message: str) -> None:
    model = tiny_llama()
    before = model.config
    with pytest.raises(ValueError, match=message):
        remove_blocks(model, blocks)
    assert model.config is before
    assert len(model.model.layers) == 3


def test_a_half_of_a_block_that_goes_is_named_twice() -> None:
    model = tiny_llama()
    with (
        pytest.raises(ValueError, match="Block 1.mlp is named"),
        bypassed(model, [1, Unit(1, "mlp")]),
    ):
        pass


def test_two_halves_are_a_block() -> None:
    ours, theirs = tiny_llama(num_hidden_layers=5), tiny_llama(num_hidden_layers=5)
    remove_blocks(ours, [2])
    for half in (Unit(0, "attn"), Unit(2, "mlp"), Unit(2, "attn")):  # block 3 is now block 2
        remove_blocks(ours, [half])
    remove_blocks(theirs, [2, 3, Unit(0, "attn")])
    assert ours.config.num_hidden_layers == 3
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert HalfBlocks().of(ours) == (
        Unit(0, "mlp"), Unit(1, "attn"), Unit(1, "mlp"), Unit(2, "attn"), Unit(2, "mlp")
    )  # fmt: skip
    assert WholeBlocks().of(ours) == (Unit(0), Unit(1), Unit(2))
    secateur = ours.config.secateur
    assert secateur["kept_blocks"] == theirs.config.secateur["kept_blocks"] == [0, 1, 4]
    assert [removal["blocks"] for removal in secateur["removals"]] == [[2], [], [], [3]]
    halves = [removal.get("halves") for removal in secateur["removals"]]
    assert halves == [None, ["0.attn"], ["3.mlp"], None]
    with pytest.raises(ValueError, match="No attention would remain in the model"):
        remove_blocks(ours, [Unit(1, "attn"), Unit(2, "attn")])
    assert HalfBlocks().of(ours) == HalfBlocks().of(theirs)


def test_an_error_inside_puts_everything_back() -> None:
    model = tiny_llama()
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError), bypassed(model, [0, Unit(2, "attn")]):
        model(torch.zeros(1, 4, 7, dtype=torch.long), use_cache=False)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("rule", "value"),
    [("max_window_layers", 2), ("num_kv_shared_layers", 1), ("block_kinds", ["a", "b", "a"])],
)
def test_a_rule_of_the_index_is_refused_by_name(rule: str, value: Any) -> None:
    config = tiny_llama_config()
    setattr(config, rule, value)
    with pytest.raises(ValueError, match=f"`{rule}`"):
        shortened_config(config, [0, 2])


def test_a_rule_with_a_per_block_list_is_accepted() -> None:
    config = tiny_config("qwen3")
    assert config.max_window_layers == 28
    types = ["full_attention", "full_attention", "full_attention", "sliding_attention"]
    config.layer_types = types
    assert shortened_config(config, [0, 3]).layer_types == ["full_attention", "sliding_attention"]
    config.layer_types = types[:3]
    with pytest.raises(ValueError, match="`layer_types` .* has 3 entries for 4 blocks"):
        shortened_config(config, [0, 3])


def test_lists_of_block_indices_are_renumbered() -> None:
    config = tiny_llama_config(num_hidden_layers=5)
    config.mlp_only_layers = [0, 2, 4]
    assert shortened_config(config, [1, 2, 4]).mlp_only_layers == [1, 2]


def test_ids_as_many_as_blocks_are_not_per_block() -> None:
    config = tiny_llama_config(eos_token_id=[2, 3, 4])
    assert shortened_config(config, [0]).eos_token_id == [2, 3, 4]


def test_a_quantised_model_is_refused() -> None:
    model = tiny_llama()
    model.config = copy.deepcopy(model.config)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="score blocks on it, and remove them from the original"):
        remove_blocks(model, [1])


def test_replacements_follow_the_mode_of_the_model() -> None:
    model = tiny_model("opt").train()
    with bypassed(model, [1, Unit(2, "attn")]):
        assert all(module.training for module in model.modules())


def test_a_shortened_model_trains() -> None:
    model = tiny_llama()
    remove_blocks(model, [0])
    windows_BT = torch.arange(3, 15).view(2, 6)
    model(windows_BT, labels=windows_BT).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
