"""What a GGUF file holds. What llama.cpp computes from it is shown in tests/serving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from secateur.pruning.commands import UsageError
from secateur.pruning.export.rewrite import prune_blocks, prune_checkpoint
from tests.pruning.export.plans import heads_plan, native_plan, uneven_plan, uniform_plan
from tests.tiny import tiny_config, tiny_family_folder, tiny_folder, tiny_tokenizer

gguf = pytest.importorskip("gguf", reason="pip install 'secateur[serving]'")

from secateur.pruning.export.gguf_file import main, write_gguf  # noqa: E402


def folder_of(path: Path, family: str, **overrides: Any) -> Path:
    tiny_tokenizer().save_pretrained(path)
    return tiny_family_folder(path, family, **overrides)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Keys and tensors of a file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {t.name: torch.tensor(t.data.copy()) for t in reader.tensors}


def test_a_stock_model_keeps_its_architecture(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    prune_checkpoint(base, uniform_plan(base), tmp_path / "small")
    assert write_gguf(tmp_path / "small", tmp_path / "small.gguf", "f32") == []
    keys, tensors = read(tmp_path / "small.gguf")
    dense = load_file(tmp_path / "small" / "model.safetensors")
    assert keys["general.architecture"] == "llama"
    width = dense["model.layers.0.mlp.up_proj.weight"].shape[0]
    assert keys["llama.feed_forward_length"] == width
    assert keys["llama.attention.head_count_kv"] == 2
    assert len(tensors) == len(dense)
    assert torch.equal(tensors["blk.1.ffn_up.weight"], dense["model.layers.1.mlp.up_proj.weight"])
    # Rotary embedding turns neighbours: of a head of 4 rows 0 1 2 3 become 0 2 1 3.
    query = dense["model.layers.1.self_attn.q_proj.weight"].view(-1, 4, 24)
    assert torch.equal(tensors["blk.1.attn_q.weight"].view(-1, 4, 24), query[:, [0, 2, 1, 3]])


def test_removed_parts_are_written(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", num_hidden_layers=4)
    plan = native_plan(base, removed=[(0, "attn"), (1, "mlp"), (2, "attn")])
    prune_checkpoint(base, plan, tmp_path / "small")
    write_gguf(tmp_path / "small", tmp_path / "small.gguf", "f32")
    keys, tensors = read(tmp_path / "small.gguf")
    assert keys["general.architecture"] == "deci"
    assert keys["deci.feed_forward_length"] == [37, 1, 17, 32]
    # Block 0 tells llama.cpp the size of heads: it has one head of zeros.
    assert keys["deci.attention.head_count"] == [1, 6, 0, 6]
    assert keys["deci.attention.head_count_kv"] == [1, 2, 0, 2]
    assert not tensors["blk.0.attn_output.weight"].any()
    assert not tensors["blk.1.ffn_down.weight"].any()
    assert "blk.2.attn_q.weight" not in tensors


def test_heads_are_written_block_by_block(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", num_attention_heads=12, num_key_value_heads=6)
    prune_checkpoint(base, heads_plan(base, [6, 1, 4]), tmp_path / "small")
    write_gguf(tmp_path / "small", tmp_path / "small.gguf", "f32")
    keys, tensors = read(tmp_path / "small.gguf")
    assert keys["general.architecture"] == "deci"
    assert keys["deci.attention.head_count"] == [12, 2, 8]
    assert keys["deci.attention.head_count_kv"] == [6, 1, 4]
    assert keys["deci.attention.key_length"] == 2
    assert tensors["blk.2.attn_q.weight"].shape == (16, 24)
    assert tensors["blk.1.attn_k.weight"].shape == (2, 24)
    # Equal numbers of heads that divide the stream leave the architecture of the family.
    prune_checkpoint(base, heads_plan(base, [4, 4, 4]), tmp_path / "uniform")
    write_gguf(tmp_path / "uniform", tmp_path / "uniform.gguf", "f32")
    keys, _ = read(tmp_path / "uniform.gguf")
    assert keys["general.architecture"] == "llama"
    assert (keys["llama.attention.head_count"], keys["llama.attention.key_length"]) == (8, 2)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_every_type_has_its_size(kind: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", hidden_size=96, intermediate_size=64)
    assert write_gguf(base, tmp_path / "m.gguf", kind) == []
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    bits = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5}[kind]
    for tensor in reader.tensors:
        expected = 32 if len(tensor.shape) == 1 else bits
        assert tensor.n_bytes * 8 == tensor.n_elements * expected, tensor.name


def test_narrow_rows_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_folder(tmp_path / "base")
    main([str(base), str(tmp_path / "m.gguf"), "--type", "q8_0"])
    said = capsys.readouterr().out
    assert "23 matrices have rows whose length is not a multiple of 32" in said
    assert "width_multiple: 32" in said


def test_tokens_merges_and_special_tokens_are_written(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", vocab_size=330)
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    write_gguf(base, tmp_path / "m.gguf", "f32")
    keys, _ = read(tmp_path / "m.gguf")
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = keys["tokenizer.ggml.tokens"]
    assert {token: tokens.index(token) for token in vocabulary} == vocabulary
    assert tokens[len(vocabulary) :] == [f"[PAD{n}]" for n in range(len(vocabulary), 330)]
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert keys["tokenizer.ggml.add_bos_token"]
    assert not keys["tokenizer.ggml.add_eos_token"]
    assert keys["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_merges_of_sentencepiece_become_scores(tmp_path: Path, data: Path) -> None:
    write_gguf(data / "models" / "stories260K", tmp_path / "m.gguf")
    keys, _ = read(tmp_path / "m.gguf")
    merges = json.loads((data / "models" / "stories260K" / "tokenizer.json").read_text())["model"]
    scores = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"], strict=True))
    joined = ["".join(m.split(" ") if isinstance(m, str) else m) for m in merges["merges"]]
    best = [scores[token] for token in dict.fromkeys(joined)]
    assert best == sorted(best, reverse=True)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"]


def test_models_that_llama_cpp_computes_differently_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"

    def refused(folder: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            write_gguf(folder, out)
        assert not list(tmp_path.glob("*.gguf*"))

    refused(folder_of(tmp_path / "opt", "opt"), "does not write 'opt' models")
    refused(folder_of(tmp_path / "bias", "qwen3", attention_bias=True), "`attention_bias`")
    refused(folder_of(tmp_path / "untied", "gemma2"), "`tie_word_embeddings` false")
    gemma = folder_of(tmp_path / "gemma", "gemma2", tie_word_embeddings=True)
    prune_blocks(gemma, tmp_path / "odd", remove=[0])
    refused(tmp_path / "odd", "full attention in other blocks than one in every 2")
    prune_checkpoint(gemma, native_plan(gemma), tmp_path / "parts")
    refused(tmp_path / "parts", "has widths per block for Llama, Mistral and Qwen2")
    refused(tiny_family_folder(tmp_path / "mute", "llama"), "holds no tokenizer.json")
    base = tiny_folder(tmp_path / "base")
    prune_checkpoint(base, uneven_plan(base), tmp_path / "narrow")
    refused(tmp_path / "narrow", r"1 of 24 entries of the residual stream at the site attn_in")
    with pytest.raises(ValueError, match="`type` must be one of f32, f16, bf16, q8_0, got 'q4'"):
        write_gguf(base, out, "q4")


def with_added(folder: Path, **special: str) -> Path:
    """A model whose tokenizer has special tokens above the rows of the embeddings."""
    base = tiny_folder(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(base)
    return base


def test_added_tokens_without_an_embedding_are_left_out(tmp_path: Path) -> None:
    """As those of Gemma 3 (an image) and of Llama 2 with a pad of somebody."""
    base = with_added(tmp_path / "base", pad_token="<pad>")
    (note,) = write_gguf(base, tmp_path / "m.gguf", "f32")
    assert note == "The model has no embedding of <pad>: left out of the file."
    keys, tensors = read(tmp_path / "m.gguf")
    tokens = keys["tokenizer.ggml.tokens"]
    assert len(tokens) == tensors["token_embd.weight"].shape[0] == tiny_config("llama").vocab_size
    assert "<pad>" not in tokens
    assert "tokenizer.ggml.padding_token_id" not in keys


def test_tokens_of_text_without_an_embedding_are_refused(tmp_path: Path) -> None:
    ends = with_added(tmp_path / "ends", eos_token="<end>")
    with pytest.raises(ValueError, match=r"has token \d+ \('<end>'\) and the model \d+ embeddings"):
        write_gguf(ends, tmp_path / "m.gguf")
    words = tiny_folder(tmp_path / "words", vocab_size=280)
    with pytest.raises(ValueError, match="give it the tokenizer that it was trained with"):
        write_gguf(words, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.glob("*gguf*")] == []


def test_a_window_that_llama_cpp_lacks_ends_the_context(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", "mistral", sliding_window=5)
    (note,) = write_gguf(base, tmp_path / "m.gguf")
    assert "window of 5 tokens" in note
    assert read(tmp_path / "m.gguf")[0]["llama.context_length"] == 5


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has no config.json"):
        main([str(tmp_path), str(tmp_path / "m.gguf")])
    with pytest.raises(UsageError, match=r"no option `--typ`. Did you mean `--type`"):
        main([str(tmp_path), str(tmp_path / "m.gguf"), "--typ", "f16"])
