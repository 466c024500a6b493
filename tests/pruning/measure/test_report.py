from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.pruning.costs import Flops, Parameters
from secateur.pruning.families import skeleton
from secateur.pruning.measure.perplexity import MeasuredPerplexity
from secateur.pruning.measure.report import Report, measure
from secateur.pruning.measure.row import Row
from secateur.pruning.measure.sizes import (
    Counts,
    count,
    file_bytes,
    memory_bytes,
    zero_fraction,
)
from secateur.pruning.measure.speed import Speed
from secateur.pruning.measure.zero_shot import Ending, Question
from tests.tiny import VOCABULARY, tiny_folder, tiny_llama, tiny_llama_config

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 10},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_counter_and_cost_tables_agree(variant: dict[str, Any]) -> None:
    model = tiny_llama(**variant)
    counts = count(model)
    assert counts.parameters == Parameters(whole_model=True).table(model).dense
    assert counts.block_projection_parameters == Parameters().table(model).dense
    assert counts.block_flops_per_token == Flops().table(model).dense
    whole = Flops(whole_model=True, context_tokens=48).table(model).dense
    assert counts.flops_per_token(48) == whole
    assert count(skeleton(model.config)) == counts


def test_counter_agrees_with_operations_that_torch_sees() -> None:
    """torch counts the products of matrices: all of ours but the biases, which are off here."""
    model, tokens = tiny_llama(attn_implementation="eager"), 16
    with FlopCounterMode(display=False) as seen, torch.no_grad():
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    assert seen.get_total_flops() == count(model).flops_per_token(tokens) * tokens


def test_a_case_worked_by_hand() -> None:
    """One block of width 4, 2 heads on 1, MLP 3, vocabulary 7, tied.

    Attention 4x4 + 2 (4x2) + 4x4 = 48, MLP 3 (4x3) = 36: 84 weights. Norms 3 x 4, embedding 28.
    """
    model = tiny_llama(
        vocab_size=7, hidden_size=4, intermediate_size=3, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    assert count(model) == Counts(84 + 12 + 28, 84, 168, 56, 4)
    assert count(model).flops_per_token(10) == 168 + 56 + 4 * 10 * 4


def test_narrowed_layers_are_counted_as_they_are() -> None:
    model = tiny_llama()
    before = count(model)
    mlp = model.model.layers[1].mlp
    mlp.down_proj = nn.Linear(30, 24, bias=False)
    after = count(model)
    assert before.block_projection_parameters - after.block_projection_parameters == 7 * 24
    assert before.block_flops_per_token - after.block_flops_per_token == 2 * 7 * 24
    assert before.parameters - after.parameters == 7 * 24


def test_zeros_and_memory_are_those_of_the_weights() -> None:
    model = tiny_llama(tie_word_embeddings=True).to(torch.bfloat16)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight[:10] = 0
    weights = Parameters().table(model).dense
    assert zero_fraction(model) == pytest.approx(10 * 24 / weights)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert memory_bytes(model) == 2 * model.num_parameters() + buffers  # the tied one once


def test_what_cannot_be_counted_is_told() -> None:
    with pytest.raises(ValueError, match="no list of blocks"):
        count(nn.Linear(3, 3))
    model = tiny_llama()
    packed = torch.zeros(24 * 37 // 2, 1, dtype=torch.uint8)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match="Quantised weights cannot be counted"):
        count(model)


def row(name: str, nll: float, counts: Counts, **more: Any) -> Row:
    return Row(name, {"stories": MeasuredPerplexity(nll, nll, None, 10)}, counts, **more)


SPEED = Speed(0.2, 0.3, 0.01, 50.0, 2_000_000, {"prefill_seconds": (0.19, 0.23)})


def report() -> Report:
    dense = Counts(1000, 800, 1600, 100, 5)
    half = Counts(600, 400, 800, 100, 5)
    return Report(
        [
            row("dense", 10.0, dense, speed=SPEED),
            row("learned", 12.5, half, file_bytes=2_400_000),
        ],
        context_tokens=10,
        conditions={"device": "cpu"},
    )


def test_markdown_shows_everything_that_was_measured() -> None:
    assert report().markdown().splitlines() == [
        "The quality of learned has collapsed: perplexity 12.50 against 10.00 on stories. It has "
        "60.0% of the parameters and 57.9% of the FLOPs per token (at 10 tokens of context).",
        "",
        "| model | dense | learned |",
        "| --- | ---: | ---: |",
        "| perplexity stories | 10.00 | 12.50 |",
        "| excess stories, nats |  | +2.500 |",
        "| parameters | 1,000 | 600 |",
        "| parameters in blocks | 800 | 400 |",
        "| kept in blocks | 1.0000 | 0.5000 |",
        "| FLOPs per token at 10 tokens | 1.900e+03 | 1.100e+03 |",
        "| kept FLOPs at 10 tokens | 1.0000 | 0.5789 |",
        "| prefill, ms | 200.0 (190.0 to 230.0) |  |",
        "| time to first token, ms | 300.0 |  |",
        "| decode, ms per token | 10.00 |  |",
        "| peak memory, MB | 2 |  |",
        "| weights on disk, MB |  | 2.40 |",
        "",
        "predicted tokens of stories 10, context_tokens 10, device cpu",
    ]


def test_json_holds_the_figures_and_their_fractions() -> None:
    figures = json.loads(report().json())
    learned = figures["models"]["learned"]
    assert learned["perplexity"]["stories"]["value"] == 12.5
    assert learned["kept_block_parameters"] == 0.5
    assert learned["kept_block_flops"] == 0.5
    assert learned["kept_parameters"] == 0.6
    assert learned["kept_flops"] == pytest.approx(1100 / 1900)
    assert learned["speed"] is None
    assert figures["models"]["dense"]["speed"]["decode_seconds"] == 0.01
    assert figures["conditions"] == {"device": "cpu"}
    assert figures["verdicts"]["learned"]["grade"] == "collapsed"


def test_the_table_is_one_that_people_read() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(report().table())
    text = out.getvalue()
    for cell in ("perplexity stories", "12.50", "0.5789", "context_tokens 10, device cpu"):
        assert cell in text


def test_more_than_four_models_have_a_line_each() -> None:
    own, out = report(), io.StringIO()
    dense, learned = own.rows
    many = [dense, *(replace(learned, name=f"narrow {number}") for number in range(4))]
    Console(file=out, width=120).print(replace(own, rows=many).table())
    lines = out.getvalue().splitlines()
    assert [line for line in lines if "perplexity" in line and "model" in line]
    for number in range(4):
        assert [line for line in lines if f"narrow {number}" in line and "12.50" in line]
    assert not [line for line in lines if "zeros" in line]


def test_models_are_measured_side_by_side(tmp_path: Path) -> None:
    models = {"dense": tiny_llama(), "narrow": tiny_llama(intermediate_size=20)}
    folder = tiny_folder(tmp_path / "dense")
    draw = torch.Generator().manual_seed(0)
    texts = {"a": torch.randint(VOCABULARY, (3, 12), generator=draw)}
    speed = {"batch_size": 1, "prompt_tokens": 4, "new_tokens": 2, "repeats": 1}
    endings = (Ending((1, 5, 6), 1, 4), Ending((1, 7), 1, 2))
    tasks = {"b": [Question(endings, 0), Question(endings, 1)]}
    result = measure(models, texts, {"dense": folder}, speed=speed, tasks=tasks)
    dense, narrow = result.rows
    assert dense.file_bytes == (folder / "model.safetensors").stat().st_size
    (folder / "plan.safetensors").write_bytes(b"no weights")
    assert file_bytes(folder) == dense.file_bytes
    assert narrow.file_bytes is None
    assert narrow.counts.block_projection_parameters == int(
        Parameters().table(models["narrow"]).dense
    )
    assert dense.perplexity["a"].num_predictions == 33
    assert dense.speed is not None
    assert result.context_tokens == 12
    told = dict(result.conditions)
    assert re.fullmatch(rf"\d+\.\d of {os.cpu_count()} cores", told.pop("load"))
    assert told == {"device": "cpu", "dtype": "float32", "threads": 1, **speed}
    assert "load" not in measure(models, texts).conditions  # without times it says nothing
    assert dense.zeros == 0
    assert dense.memory_bytes == memory_bytes(models["dense"])
    # Of two equal questions with other labels, one is right whatever the model says.
    assert dense.zero_shot["b"].accuracy == narrow.zero_shot["b"].normalised == 0.5
    assert "| accuracy b | 0.5000 +- 0.5000 | 0.5000 +- 0.5000 |" in result.markdown()
    narrow_figures = json.loads(result.json())["models"]["narrow"]
    assert narrow_figures["kept_block_flops"] < 1
    assert narrow_figures["zero_shot"]["b"]["num_questions"] == 2


def test_bad_requests_are_told(tmp_path: Path) -> None:
    texts = {"a": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="needs models and texts, got 0 and 1"):
        measure({}, texts)
    with pytest.raises(ValueError, match="`folders` names other, which `models` does not"):
        measure({"dense": tiny_llama()}, texts, {"other": tmp_path})
    with pytest.raises(ValueError, match="holds neither model.safetensors"):
        file_bytes(tmp_path)


def test_a_model_on_the_meta_device_is_counted_without_memory() -> None:
    config = tiny_llama_config(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32,
    )  # fmt: skip
    counts = count(skeleton(config))
    assert counts.parameters == 6_738_415_616  # LLaMA-2-7B
    assert counts.block_projection_parameters == 6_476_005_376
