"""What the form that vLLM has built in holds. What vLLM computes is shown in tests/serving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from secateur.pruning.export.nemotron_nas import main, write_nemotron_nas
from secateur.pruning.export.rewrite import prune_checkpoint
from tests.pruning.export.plans import heads_plan, native_plan, uneven_plan, uniform_plan
from tests.tiny import tiny_family_folder, tiny_folder


def pruned(place: Path, base: Path, *removed: tuple[int, str], **settings: Any) -> Path:
    prune_checkpoint(base, native_plan(base, removed, **settings), place / "small")
    return place / "small"


def width_of_server(ffn: dict[str, Any], hidden: int) -> int:
    """The width that vLLM and SGLang compute from the multiplier."""
    size = int(2 * ffn["ffn_mult"] * hidden / 3)
    return size + -size % 256


def test_blocks_are_written_as_they_are(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", num_hidden_layers=4)
    small = pruned(tmp_path, base, (1, "mlp"), (2, "attn"))
    (note,) = write_nemotron_nas(small, tmp_path / "out")
    assert "MLPs of blocks 0, 2, 3 have widths that are not multiples of 256" in note
    assert "`width_multiple: 256`" in note
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["DeciLMForCausalLM"]
    attends = {"no_op": False, "n_heads_in_group": 3}
    assert config["block_configs"] == [
        {"attention": attends, "ffn": {"no_op": False, "intermediate_size": 37}},
        {"attention": attends, "ffn": {"no_op": True}},
        {"attention": {"no_op": True}, "ffn": {"no_op": False, "intermediate_size": 17}},
        {"attention": attends, "ffn": {"no_op": False, "intermediate_size": 32}},
    ]
    weights = (small / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_its_configuration_reads_blocks_as_attributes(tmp_path: Path) -> None:
    small = pruned(tmp_path, tiny_family_folder(tmp_path / "base", "qwen2"), (1, "mlp"))
    write_nemotron_nas(small, tmp_path / "out")
    config: Any = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.block_configs[1].ffn.no_op
    assert not hasattr(config.block_configs[0].ffn, "ffn_mult")
    assert config.qkv_bias  # which the server asks for biases of queries, keys and values
    assert json.loads(config.to_json_string())["block_configs"][1]["ffn"] == {"no_op": True}


def test_multiples_of_256_have_the_multiplier_as_well(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", intermediate_size=768, num_hidden_layers=4)
    small = pruned(tmp_path, base, widths=(256, 512, 256))
    assert write_nemotron_nas(small, tmp_path / "out") == []
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    mlps = [block["ffn"] for block in config["block_configs"]]
    assert [mlp["intermediate_size"] for mlp in mlps] == [768, 256, 512, 256]
    assert [width_of_server(mlp, 24) for mlp in mlps] == [768, 256, 512, 256]


def test_a_first_block_without_attention_gets_one_of_zeros(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", attention_bias=True)
    small = pruned(tmp_path, base, (0, "attn"))
    notes = write_nemotron_nas(small, tmp_path / "out")
    assert "Block 0 has no attention" in notes[-1]
    idle = load_file(tmp_path / "out" / "model-idle.safetensors")
    dense = load_file(base / "model.safetensors")
    assert {name: tensor.shape for name, tensor in idle.items()} == {
        name: tensor.shape
        for name, tensor in dense.items()
        if "layers.0.self_attn" in name or "layers.0.input_layernorm" in name
    }
    assert not any(tensor.any() for tensor in idle.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"]} == {*load_file(small / "model.safetensors"), *idle}


def test_unsupported_models_are_refused(tmp_path: Path) -> None:
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            write_nemotron_nas(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    base = tiny_folder(tmp_path / "base")
    refused(base, "is a stock model, which vLLM serves unchanged")
    prune_checkpoint(base, uniform_plan(base), tmp_path / "uniform")
    refused(tmp_path / "uniform", "is a stock model")
    prune_checkpoint(base, uneven_plan(base), tmp_path / "narrow")
    refused(tmp_path / "narrow", "1 of 24 entries of the residual stream at the site attn_in")
    prune_checkpoint(base, heads_plan(base, [2, 1, 2]), tmp_path / "heads")
    refused(
        tmp_path / "heads", "has key-value heads 2, 1, 2 in its blocks, and this format has one"
    )
    (tmp_path / "q").mkdir()
    qwen = pruned(tmp_path / "q", tiny_family_folder(tmp_path / "qwen3", "qwen3"))
    refused(qwen, "for Llama, Mistral and Qwen2, not for 'qwen3' models")
    (tmp_path / "g").mkdir()
    gelu = pruned(tmp_path / "g", tiny_family_folder(tmp_path / "gelu", "llama", hidden_act="gelu"))
    refused(gelu, "`hidden_act` 'silu', not 'gelu'")
    with pytest.raises(ValueError, match="is the base model itself"):
        write_nemotron_nas(gelu, gelu)


def test_the_command_replaces_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = pruned(tmp_path, tiny_folder(tmp_path / "base", num_hidden_layers=4))
    for _ in range(2):
        main([str(small), str(tmp_path / "out")])
        said = capsys.readouterr().out
        assert said.startswith(f"Written to {tmp_path / 'out'}.")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds notes.txt, which Secateur did not write"):
        main([str(small), str(tmp_path / "out")])
