"""What holds for every family and variant when blocks go, up to a stranger's process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from secateur.pruning.depth import Unit, bypassed, fractions, remove_blocks
from secateur.pruning.export.rewrite import prune_blocks
from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.files.finish import for_older_readers
from secateur.pruning.measure.sizes import count
from tests.stranger import run_as_stranger
from tests.tiny import VARIANTS, VOCABULARY, tiny_model

ROWS = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]
GONE = [0, 2]


@dataclass(frozen=True)
class Pair:
    dense: PreTrainedModel
    short: PreTrainedModel
    cut: Path
    saved: Path


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def skipping(model: PreTrainedModel, blocks: list[int]) -> Iterator[PreTrainedModel]:
    """The oracle: blocks run, and hooks give back what went into them."""
    handles = [
        blocks_of(model, family_of(model.config))[block].register_forward_hook(
            lambda module, args, output: args[0]
        )
        for block in blocks
    ]
    yield model
    for handle in handles:
        handle.remove()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Pair]:
    """All rows without blocks 0 and 2, in memory and on disk; nothing may write there."""
    made = {}
    for number, (family, variant) in enumerate(ROWS):
        path = tmp_path_factory.mktemp(f"row{number}")
        dense, short = (tiny_model(family, **VARIANTS[family][variant]) for _ in range(2))
        dense.save_pretrained(path / "base")
        prune_blocks(path / "base", path / "cut", remove=GONE)
        remove_blocks(short, GONE)
        short.save_pretrained(path / "saved")
        made[family, variant] = Pair(dense, short, path / "cut", path / "saved")
    return made


@pytest.fixture(params=ROWS, ids="-".join)
def pair(request: pytest.FixtureRequest, pairs: dict[tuple[str, str], Pair]) -> Pair:
    return pairs[request.param]


@torch.no_grad()
def test_removed_equals_bypassed_equals_skipped(pair: Pair) -> None:
    windows_BT = tokens(3, 20)
    full_BTV = pair.dense(windows_BT).logits
    with skipping(pair.dense, GONE) as dense:
        expected_BTV = dense(windows_BT, use_cache=False).logits
    with bypassed(pair.dense, GONE):
        close(pair.dense(windows_BT, use_cache=False).logits, expected_BTV)
    close(pair.short(windows_BT).logits, expected_BTV)
    assert (full_BTV - expected_BTV).abs().max() > 0.1  # the blocks did matter
    assert torch.equal(pair.dense(windows_BT).logits, full_BTV)  # and are back


@torch.no_grad()
def test_a_cached_decode_without_block_0_counts_from_the_start(pair: Pair) -> None:
    given_Bt, cache = tokens(2, 7), DynamicCache(config=pair.short.config)
    seen_BT = given_Bt
    for _ in range(6):
        logits_BtV = pair.short(given_Bt, past_key_values=cache, use_cache=True).logits
        with skipping(pair.dense, GONE) as dense:
            close(logits_BtV[:, -1], dense(seen_BT, use_cache=False).logits[:, -1])
        given_Bt = logits_BtV[:, -1:].argmax(-1)
        seen_BT = torch.cat([seen_BT, given_Bt], dim=1)
    assert cache.get_seq_length() == 12


def test_numbers_and_lists_follow(pair: Pair) -> None:
    config = pair.short.config
    blocks = blocks_of(pair.short, family_of(config))
    assert config.num_hidden_layers == len(blocks) == 2
    for index, block in enumerate(blocks):
        found = {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")}
        assert found == {index}
    if getattr(config, "layer_types", None) is not None:
        assert config.layer_types == [pair.dense.config.layer_types[block] for block in (1, 3)]
    assert pair.dense.config.num_hidden_layers == 4
    assert all(m.config is config for m in pair.short.modules() if hasattr(m, "config"))
    assert config.secateur["kept_blocks"] == [1, 3]


def test_fractions_are_those_that_the_removal_leaves(pair: Pair) -> None:
    found = fractions(pair.dense.config, [Unit(block) for block in GONE], context_tokens=16)
    dense, short = count(pair.dense), count(pair.short)
    assert found.blocks == 0.5
    assert found.parameters == pytest.approx(1 - short.parameters / dense.parameters)
    assert found.flops == pytest.approx(1 - short.flops_per_token(16) / dense.flops_per_token(16))


@torch.no_grad()
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_silent_half_adds_nothing(part: Any, pair: Pair) -> None:
    family, windows_BT = family_of(pair.dense.config), tokens(2, 9)
    writer = family.gates[f"{part}_out"].path
    projection = blocks_of(pair.dense, family)[1].get_submodule(writer)
    before = pair.dense.num_parameters()
    with bypassed(pair.dense, [Unit(1, part)]):
        found_BTV = pair.dense(windows_BT, use_cache=False).logits
        counted = 1 - pair.dense.num_parameters() / before
    with bypassed(pair.dense, [Unit(0, part)]):  # where caches count tokens
        cache, uncached_BTV = DynamicCache(), pair.dense(windows_BT, use_cache=False).logits
        for begin, end in ((0, 4), (4, 5), (5, 9)):
            given = {"past_key_values": cache, "use_cache": True}
            logits_BtV = pair.dense(windows_BT[:, begin:end], **given).logits
            torch.testing.assert_close(logits_BtV, uncached_BTV[:, begin:end], atol=1e-3, rtol=0)
    handle = projection.register_forward_hook(lambda module, args, output: output * 0)
    expected_BTV = pair.dense(windows_BT).logits
    handle.remove()
    close(found_BTV, expected_BTV)
    assert (pair.dense(windows_BT).logits - expected_BTV).abs().max() > 0.01
    assert fractions(pair.dense.config, [Unit(1, part)]).parameters == pytest.approx(counted)
    with bypassed(pair.dense, [Unit(1, "attn"), Unit(1, "mlp")]):
        both_BTV = pair.dense(windows_BT, use_cache=False).logits
    with bypassed(pair.dense, [1]):
        close(both_BTV, pair.dense(windows_BT, use_cache=False).logits)


_STRANGER = """
import sys, warnings, torch
from transformers import AutoModelForCausalLM, utils
utils.logging.disable_progress_bar()
warnings.simplefilter("error")
given = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__module__.startswith("transformers.")
    torch.save((model(given).logits.detach(), model.num_parameters()), folder + ".pt")
"""


def test_a_fresh_process_loads_stock_models(
    pairs: dict[tuple[str, str], Pair], tmp_path: Path
) -> None:
    windows_BT = tokens(2, 9)
    torch.save(windows_BT, tmp_path / "given.pt")
    folders = [pair.cut for pair in pairs.values()]
    run_as_stranger(_STRANGER, tmp_path / "given.pt", *folders, folder=tmp_path)
    for pair in pairs.values():
        with torch.no_grad():
            expected_BTV = pair.short(windows_BT).logits
        logits_BTV, parameters = torch.load(f"{pair.cut}.pt", weights_only=True)
        close(logits_BTV, expected_BTV)
        assert parameters == pair.short.num_parameters()


def test_the_checkpoint_is_what_the_model_saves(pair: Pair) -> None:
    cut, saved = (load_file(folder / "model.safetensors") for folder in (pair.cut, pair.saved))
    assert cut.keys() == saved.keys()
    assert all(torch.equal(cut[name], saved[name]) for name in cut)
    configs = [json.loads((f / "config.json").read_text()) for f in (pair.cut, pair.saved)]
    for config in configs:
        del config["secateur"]["removals"]  # the checkpoint knows its base model too
    # The checkpoint also has the names that older versions of transformers read.
    assert configs[0] == configs[1] | for_older_readers(configs[1])
