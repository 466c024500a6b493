from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from secateur.pruning.export import sources
from secateur.pruning.export.depth_command import main
from secateur.pruning.export.rewrite import prune_blocks
from secateur.pruning.families import skeleton
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.files.model_folder import BLOCKS
from tests.tiny import tiny_folder, tiny_llama


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("model*.safetensors") for n, t in load_file(path).items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "base", num_hidden_layers=5)


def test_tensors_are_dropped_renamed_and_otherwise_untouched(base: Path, tmp_path: Path) -> None:
    prune_blocks(base, tmp_path / "short", remove=[3, 0])
    dense, short = tensors_of(base), tensors_of(tmp_path / "short")
    expected = {n: t for n, t in dense.items() if not n.startswith("model.layers.")}
    for new, old in enumerate([1, 2, 4]):
        prefix = f"model.layers.{old}."
        expected |= {
            f"model.layers.{new}.{n.removeprefix(prefix)}": t
            for n, t in dense.items()
            if n.startswith(prefix)
        }
    assert short.keys() == expected.keys()
    assert all(torch.equal(short[name], expected[name]) for name in short)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (base, tmp_path / "short")
    )
    assert {key for key in after if before.get(key) != after[key]} == {
        "num_hidden_layers",
        "rope_theta",
        "secateur",
        "torch_dtype",
    }
    files = {path.name for path in (tmp_path / "short").iterdir()}
    assert {"tokenizer.json", "generation_config.json", BLOCKS} <= files


def test_keep_is_the_other_way_to_say_it(base: Path, tmp_path: Path) -> None:
    prune_blocks(base, tmp_path / "a", remove=[3, 0], provenance={"score": "Perplexity()"})
    prune_blocks(base, tmp_path / "b", keep=[4, 1, 2], provenance={"score": "Perplexity()"})
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    record = json.loads((tmp_path / "a" / BLOCKS).read_text())
    assert record == {
        "num_blocks": 5,
        "kept_blocks": [1, 2, 4],
        "removals": [{"base": fingerprint(base), "blocks": [0, 3], "score": "Perplexity()"}],
    }


def test_a_short_model_can_be_cut_again(base: Path, tmp_path: Path) -> None:
    prune_blocks(base, tmp_path / "a", remove=[1])
    prune_blocks(tmp_path / "a", tmp_path / "b", remove=[2])
    prune_blocks(base, tmp_path / "c", remove=[1, 3])
    twice, once = tensors_of(tmp_path / "b"), tensors_of(tmp_path / "c")
    assert all(torch.equal(twice[name], once[name]) for name in twice.keys() | once.keys())
    record = json.loads((tmp_path / "b" / BLOCKS).read_text())
    assert record["kept_blocks"] == [0, 2, 4]
    assert [step["blocks"] for step in record["removals"]] == [[1], [3]]


def folder_of_80_blocks(base: Path) -> None:
    """80 blocks in 30 shards cut across blocks, bf16, weights of a few bytes."""
    config = LlamaConfig(
        num_hidden_layers=80, hidden_size=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=12, vocab_size=16,
    )  # fmt: skip
    names = sorted(skeleton(config).state_dict())
    shapes = {name: tensor.shape for name, tensor in skeleton(config).state_dict().items()}
    base.mkdir()
    config.save_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    weight_map, size = {}, -(-len(names) // 30)
    for shard in range(30):
        file = f"model-{shard + 1:05d}-of-00030.safetensors"
        own = names[shard * size : (shard + 1) * size]
        save_file(
            {n: torch.randn(shapes[n], generator=generator).bfloat16() for n in own}, base / file
        )
        weight_map |= dict.fromkeys(own, file)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_a_70b_shaped_index(tmp_path: Path) -> None:
    base = tmp_path / "base"
    folder_of_80_blocks(base)
    gone = list(range(60, 76))
    prune_blocks(base, tmp_path / "short", remove=gone)
    index = json.loads((tmp_path / "short" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "short").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert 20 < len(files) < 30  # those with nothing left are gone, the rest is numbered anew
    dense, short = tensors_of(base), tensors_of(tmp_path / "short")
    assert torch.equal(
        short["model.layers.60.mlp.up_proj.weight"], dense["model.layers.76.mlp.up_proj.weight"]
    )
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in short.values())
    shortened = AutoConfig.from_pretrained(tmp_path / "short")
    assert {n: t.shape for n, t in skeleton(shortened).state_dict().items()} == {
        n: t.shape for n, t in short.items()
    }


def test_the_command_reads_lists_and_ranges(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    folder_of_80_blocks(base)
    prune_blocks(base, tmp_path / "expected", remove=[3, *range(60, 76)])
    for choice in (["--remove", "60-75", "3"], ["--keep", "0-2", "4-59", "76-79"]):
        main([str(base), str(out), *choice])
        assert fingerprint(out) == fingerprint(tmp_path / "expected")
        config = json.loads((out / "config.json").read_text())
        assert (config["num_hidden_layers"], config["model_type"]) == (63, "llama")
    for choice, message in (
        (["--remove", "80"], "Block 80 is out of range: the model has 80 blocks, 0 to 79"),
        (["--remove", "1", "1-2"], "Block 1 is named more than once"),
        (["--remove", "9-7"], "'9-7' is not a block; give 7, or 21-29 for a range"),
        (["--remove", "0-999999999"], "'0-999999999' is not a block; .* a range of at most 10000"),
        (["--remove", "two"], "'two' is not a block"),
        (["--remov", "3"], "there is no option `--remov`. Did you mean `--remove`?"),
        ([], "one of the arguments --remove --keep is required"),
    ):
        with pytest.raises(ValueError, match=message):
            main([str(base), str(out), *choice])
    assert fingerprint(out) == fingerprint(tmp_path / "expected")


def test_types_ties_and_mixed_files_are_kept(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    tensors = {n: t.float() if "norm" in n else t for n, t in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    prune_blocks(base, tmp_path / "short", remove=[1])
    short = tensors_of(tmp_path / "short")
    assert "lm_head.weight" not in short
    assert {n: t.dtype for n, t in short.items()} == {n: tensors[n].dtype for n in short}
    with safe_open(tmp_path / "short" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give either `remove` or `keep`"),
        ({"remove": [1], "keep": [0]}, "Give either `remove` or `keep`"),
        ({"remove": [5]}, "Block 5 is out of range"),
        ({"keep": [1, 1]}, "Block 1 is named more than once"),
        ({"keep": []}, "No block would remain of 5"),
        ({"remove": range(5)}, "No block would remain of 5"),
    ],
)
def test_lists_that_make_no_sense(
    arguments: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prune_blocks(base, tmp_path / "short", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_folders_that_are_not_ours_are_left_alone(base: Path, tmp_path: Path) -> None:
    before = fingerprint(base)
    with pytest.raises(ValueError, match="is the base model itself"):
        prune_blocks(base, base, remove=[1])
    other = shutil.copytree(base, tmp_path / "other")
    with pytest.raises(ValueError, match="is not what Secateur writes there"):
        prune_blocks(base, other, remove=[1])
    assert fingerprint(base) == fingerprint(other) == before
    for gone in ([1], [2]):  # an earlier one of ours is replaced
        prune_blocks(base, tmp_path / "short", remove=gone)
    assert json.loads((tmp_path / "short" / BLOCKS).read_text())["kept_blocks"] == [0, 1, 3, 4]


def test_a_quantised_base_names_the_way(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="remove them from the original checkpoint"):
        prune_blocks(base, tmp_path / "short", remove=[1])


@pytest.mark.parametrize("left", [5, 200, -3])
def test_a_truncated_file_is_named(left: int, base: Path, tmp_path: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        prune_blocks(base, tmp_path / "short", remove=[1])
    assert not (tmp_path / "short").exists()


def test_a_checkpoint_without_its_head_is_refused(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, base / "model.safetensors")
    with pytest.raises(ValueError, match="calls .* load it by AutoModelForCausalLM"):
        prune_blocks(base, tmp_path / "short", remove=[1])


def test_a_full_disk_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, fields: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        prune_blocks(base, tmp_path / "short", remove=[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_removal_of_nothing_and_a_folder_that_is_no_model_are_refused(
    base: Path, tmp_path: Path
) -> None:
    for which in ({"remove": []}, {"keep": range(5)}):
        with pytest.raises(ValueError, match="All 5 blocks would be kept; name one to remove"):
            prune_blocks(base, tmp_path / "short", **which)
    with pytest.raises(ValueError, match="nowhere' does not exist; check the path"):
        prune_blocks(tmp_path / "nowhere", tmp_path / "short", remove=[1])


def test_the_command_accepts_a_repeated_option(base: Path, tmp_path: Path) -> None:
    main([str(base), str(tmp_path / "short"), "--remove", "1", "--remove", "2"])
    record = json.loads((tmp_path / "short" / "blocks.json").read_text())
    assert record["kept_blocks"] == [0, 3, 4]
