from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.pruning.families import family_of, skeleton
from secateur.pruning.sites import gain_sizes
from secateur.pruning.widths.hypernetwork import FreeLogits, GRUHypernetwork
from secateur.pruning.widths.live_bytes import LiveBytes, decoder_step, loss_peak, model_step
from secateur.pruning.widths.memory import (
    INT8,
    NF4,
    Run,
    check_fits,
    footprint,
    llama2,
    main,
    memory_table,
    settings,
)
from tests.tiny import tiny_config

TINY = Run(torch.float32, batch_size=2, window_tokens=32, checkpointing=False)


# Following storages


def test_storages_are_counted_once_and_until_their_end() -> None:
    known = torch.ones(10)
    live = LiveBytes([known])
    with live:
        first = known + 1  # 40 bytes
        view = first.view(2, 5)
        second = torch.cat([known, known])  # 80 bytes
        known.add_(1)
        assert (live.now, live.peak) == (120, 120)
        del second, first
        assert (live.now, live.peak) == (40, 120)
        del view
        assert (live.now, live.peak) == (0, 120)


def test_a_llama_keeps_what_one_counts_by_hand() -> None:
    # Width 24, 6 heads of 4 on 2, MLP 37; 64 tokens. Per block and token: the inputs of two norms,
    # what their gates multiply, and the outputs of attention and MLP; queries and attended values;
    # keys and values; gate, its SiLU, up, and their product; two inverse norms, 6 sums of exp.
    per_block = 64 * (6 * 24 + 2 * 24 + 2 * 8 + 4 * 37 + 2 + 6)
    kept = [
        model_step(tiny_config("llama", num_hidden_layers=blocks), torch.float32, 2, 32, False)[0]
        for blocks in (4, 5)
    ]
    assert kept[1] - kept[0] == 4 * per_block


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.bfloat16), ("gemma2", torch.float32)]
)
def test_fake_blocks_predict_six_real_ones(
    family: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 3} if "2" in family else {}
    config = tiny_config(family, num_hidden_layers=6, **kinds)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False).train()
    real = decoder_step(model, 2, 32, checkpointing)
    assert model_step(config, dtype, 2, 32, checkpointing) == pytest.approx(real, rel=0.01)


def test_forward_passes_alone_keep_the_hidden_states_only() -> None:
    config = tiny_config("llama", num_hidden_layers=6)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    kept, peak = decoder_step(model.requires_grad_(False).train(), 2, 32, False, True)
    assert kept <= 64 * 24 * 4 * 2
    both, peak_of_both = model_step(config, torch.float32, 2, 32, False)
    assert peak < peak_of_both / 3
    found = model_step(config, torch.float32, 2, 32, False, True)
    assert found == pytest.approx((kept, peak), rel=0.01)
    assert footprint(config, replace(TINY, forward_only=True)).activations < both


def test_the_loss_of_a_chunk_is_counted_with_its_distillation() -> None:
    # Logits in bf16, in float32, and their log-softmax.
    alone = loss_peak(64, 24, 1000, torch.bfloat16, distillation=False)
    assert 10 * 64 * 1000 <= alone < 11 * 64 * 1000
    assert loss_peak(64, 24, 1000, torch.bfloat16, distillation=True) > alone + 4 * 64 * 1000


# Footprints


def test_weights_of_published_sizes() -> None:
    for size, parameters in (("7B", 6_738_415_616), ("13B", 13_015_864_320)):
        assert footprint(llama2(size), Run()).weights == 2 * parameters
    assert skeleton(llama2("70B")).num_parameters() == 68_976_648_192


def test_packed_weights_by_hand() -> None:
    config = tiny_config("llama")
    linear, rows = 4 * (2 * 24 * 24 + 2 * 24 * 8 + 3 * 24 * 37), 4 * (4 * 24 + 16 + 37 * 2 - 24)
    rest = skeleton(config).num_parameters() - linear
    run = replace(TINY, dtype=torch.bfloat16)
    assert footprint(config, run).weights == 2 * (rest + linear)
    packed = footprint(config, replace(run, storage=INT8))
    assert packed.weights == 2 * rest + linear + 4 * rows
    assert packed.gathered == 2 * 24 * 37  # the largest layer, unpacked
    four = footprint(config, replace(run, storage=NF4)).weights
    assert four == pytest.approx(2 * rest + 0.5158691 * linear, abs=20)


def test_trained_parameters_are_those_of_the_hypernetwork_and_the_gains() -> None:
    config, gates = tiny_config("llama"), 4 * (4 * 24 + 37)
    gains = sum(gain_sizes(skeleton(config), family_of(config)).values())
    free = replace(TINY, hypernetwork=FreeLogits)
    assert footprint(config, free).trained == (gates + gains) * 16
    assert footprint(config, replace(free, optimizer_bytes=2.0)).trained == (gates + gains) * 10
    large = footprint(config, replace(TINY, hypernetwork=GRUHypernetwork)).trained
    assert large > 128 * gates * 16


def test_sharded_and_offloaded_weights() -> None:
    config = llama2("7B")
    whole, two = footprint(config, Run()), footprint(config, Run(shards=2))
    assert two.weights == whole.weights // 2
    # The largest matrix, 11008 x 4096 or 32000 x 4096, and what is gathered ahead.
    assert two.gathered == 2 * (32000 * 4096 + 200_000_000)
    # A block of FSDP2 is larger than the largest of these.
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert footprint(config, Run(shards=2, live_parameters=None)).gathered == 2 * block
    off = footprint(config, Run(offloaded=True))
    assert (off.weights, off.host) == (0, whole.weights)
    assert off.total < two.total < whole.total


def test_the_total_grows_with_the_tokens_and_falls_with_checkpointing() -> None:
    config = tiny_config("llama")
    base = footprint(config, TINY)
    assert footprint(config, replace(TINY, batch_size=4)).activations > 1.9 * base.activations
    assert footprint(config, replace(TINY, checkpointing=True)).total < base.total
    assert base.total == sum(
        (base.weights, base.gathered, base.trained, base.gates, base.activations, base.working)
    )


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("batch_size", 0, "`batch_size` must be 1 or more, got 0"),
        ("window_tokens", 1, "`window_tokens` must be 2 or more, got 1"),
        ("shards", 0, "`shards` must be 1 or more, got 0"),
    ],
)
def test_settings_out_of_range(setting: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **{setting: value})


def test_packed_weights_are_not_sharded() -> None:
    with pytest.raises(ValueError, match="`storage` 4-bit cannot be sharded"):
        Run(storage=NF4, shards=2)


# Whether a run fits


def test_a_run_that_fits_is_not_talked_about() -> None:
    config = tiny_config("llama")
    assert check_fits(config, TINY, 10**12, "cpu") is None
    need = footprint(config, TINY).total
    assert check_fits(config, TINY, need, "cpu") is None


def test_a_run_that_does_not_fit_hears_the_numbers_and_what_would() -> None:
    config = tiny_config("llama")
    run = replace(TINY, batch_size=64)
    need = footprint(config, run)
    saved = footprint(config, replace(run, checkpointing=True)).total
    message = check_fits(config, run, (need.total + saved) // 2, "cuda:0")
    assert message is not None
    assert "per rank and cuda:0 has" in message
    assert "What would fit: gradient checkpointing (" in message
    with pytest.raises(ValueError, match="No setting of one such device or of 8 would fit"):
        check_fits(config, run, need.lasting // 20, "cuda:0")


def test_the_table_has_a_row_for_every_setting_and_falls() -> None:
    config = llama2("7B")
    (_, name), *rows = memory_table({"7B": config}, Run())
    assert name == "7B"
    *rows, (label, refit) = rows
    both = 2 * footprint(config, Run()).weights / 1e9
    assert (label, float(refit) > both) == ("refit on 256 windows", True)
    assert [label for label, _ in rows] == list(settings(Run()))
    figures = [float(value) for _, value in rows]
    assert figures[:4] == sorted(figures[:4], reverse=True)
    assert figures[4:] == sorted(figures[4:], reverse=True)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["7B", "--window-tokens", "512"])
    printed = capsys.readouterr().out
    assert "4-bit, checkpointing" in printed
    assert "1 x 512 tokens" in printed
