from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from secateur.pruning.blocks.source import StreamedBlocks
from secateur.pruning.commands import UsageError
from secateur.pruning.export import rewrite, sources
from secateur.pruning.export.rewrite import (
    prune_blocks,
    prune_checkpoint,
    write_pruned_checkpoint,
)
from secateur.pruning.export.verify import ExportError
from secateur.pruning.families import skeleton
from secateur.pruning.files import tensors as files
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.files.headers import INDEX, WEIGHTS
from secateur.pruning.files.model_folder import MARK, read_stages
from secateur.pruning.plan import Plan, full_plan
from secateur.pruning.weights.loop import prune_weights
from secateur.pruning.weights.magnitude import Magnitude
from secateur.pruning.weights.pattern import Unstructured
from secateur.pruning.weights.recipe import WeightRecipe
from secateur.pruning.weights.store import BlockStore
from tests.pruning.export.plans import uneven_plan, uniform_plan
from tests.runs import content
from tests.tiny import tiny_folder, tiny_llama


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()
    }


def cut(plan: Plan, tensor: torch.Tensor, path: str, *kept: torch.Tensor | None) -> torch.Tensor:
    """What stays of a tensor of a projection of block 2, times the gains of the projection."""
    assert plan.gains is not None
    for axis, (side, index_W) in enumerate(zip(("output", "input"), kept, strict=False)):
        gain_F = plan.gains[f"2.{path}.{side}"]
        if index_W is not None:
            tensor, gain_F = tensor.index_select(axis, index_W), gain_F[index_W]
        tensor = tensor * (gain_F[:, None] if axis == 0 and tensor.dim() == 2 else gain_F)
    return tensor


def test_every_tensor_is_the_slice_that_the_plan_names(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", attention_bias=True, mlp_bias=True)
    plan = uneven_plan(base)
    prune_checkpoint(base, plan, tmp_path / "small")
    dense, small = tensors_of(base), tensors_of(tmp_path / "small")
    layer = "model.layers.2"
    attn_in, attn_out, mlp_in, mlp_mid, mlp_out = (
        plan.index(2, name) for name in ("attn_in", "attn_out", "mlp_in", "mlp_mid", "mlp_out")
    )
    expected = {
        f"{path}.{kind}": cut(plan, dense[f"{layer}.{path}.{kind}"], path, *kept)
        for path, kind, *kept in (
            ("self_attn.q_proj", "weight", None, attn_in),
            ("self_attn.q_proj", "bias", None),
            ("self_attn.k_proj", "weight", None, attn_in),
            ("self_attn.o_proj", "weight", attn_out, None),
            ("self_attn.o_proj", "bias", attn_out),
            ("mlp.up_proj", "weight", mlp_mid, mlp_in),
            ("mlp.up_proj", "bias", mlp_mid),
            ("mlp.down_proj", "weight", mlp_out, mlp_mid),
            ("mlp.down_proj", "bias", mlp_out),
        )
    } | {
        "input_layernorm.weight": dense[f"{layer}.input_layernorm.weight"][attn_in],
        "input_layernorm.index": attn_in,
        "post_attention_layernorm.index": mlp_in,
        "attn_out.index": attn_out,
        "mlp_out.index": mlp_out,
    }
    for name, tensor in expected.items():
        assert torch.equal(small[f"{layer}.{name}"], tensor), name
    untouched = [name for name in dense if not name.startswith("model.layers")]
    assert all(torch.equal(small[name], dense[name]) for name in untouched)
    # A site of full width needs no index.
    assert not [name for name in small if name.startswith("model.layers.1.") and "index" in name]


def test_shards_are_read_and_written_and_agree_with_one_file(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "base")
    base = tmp_path / "sharded"
    tiny_llama().save_pretrained(base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    prune_checkpoint(tmp_path / "base", uneven_plan(tmp_path / "base"), tmp_path / "one")
    plan = uneven_plan(base)
    prune_checkpoint(base, plan, tmp_path / "many", max_shard_bytes=9_000)
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 2
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    sizes = {name: t.numel() * t.element_size() for name, t in many.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(sizes[name] for name in held) <= 9_000


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    for name in ("a", "b"):
        prune_checkpoint(base, uneven_plan(base), tmp_path / name, max_shard_bytes=30_000)
    one = content(tmp_path / "a")
    assert one == content(tmp_path / "b")
    expected = {"config.json", "generation_config.json", "tokenizer.json", "plan/plan.json"}
    assert expected < one.keys()


def test_type_ties_and_the_rest_of_the_config_are_kept(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(base)
    prune_checkpoint(base, uneven_plan(base), tmp_path / "small")
    small = tensors_of(tmp_path / "small")
    assert "lm_head.weight" not in small
    types = {t.dtype for name, t in small.items() if not name.endswith("index")}
    assert types == {torch.bfloat16}
    before = json.loads((base / "config.json").read_text())
    after = json.loads((tmp_path / "small" / "config.json").read_text())
    changed = {key for key in after if before.get(key) != after[key]}
    older = {"rope_theta", "torch_dtype"}  # what version 4 of transformers calls them
    assert changed == {"model_type", "architectures", "auto_map", "block_widths"} | older
    assert after["block_widths"] == uneven_plan(base).widths_by_block()
    assert before.keys() <= after.keys()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_folder(tmp_path / "base")
    prune_checkpoint(base, uneven_plan(base), tmp_path / "small")
    before = sorted(tmp_path.iterdir()), fingerprint(tmp_path / "small")
    written: list[Any] = []

    def once(ordered: Any, header: Any = files._header) -> Any:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(ordered)
        return header(ordered)

    monkeypatch.setattr(files, "_header", once)
    for name in ("small", "new"):
        written.clear()
        with pytest.raises(OSError, match="No space left"):
            prune_checkpoint(base, uneven_plan(base, 1), tmp_path / name, max_shard_bytes=20_000)
        assert written
    assert (sorted(tmp_path.iterdir()), fingerprint(tmp_path / "small")) == before


def test_an_earlier_model_of_ours_is_replaced(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    small = tmp_path / "small"
    prune_checkpoint(base, uneven_plan(base, 1), small)
    # What a killed run leaves behind does not matter.
    (tmp_path / ".small.secateur-partial").mkdir()
    (tmp_path / ".small.secateur-partial" / "half").touch()
    prune_checkpoint(base, uneven_plan(base, 2), small)
    assert json.loads((small / "plan" / "plan.json").read_text())["provenance"] == {"seed": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "small"]


def test_a_renamed_model_is_restored(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    small = tmp_path / "small"
    prune_checkpoint(base, uneven_plan(base), small)
    before = fingerprint(small)
    small.rename(tmp_path / ".small.secateur-replaced")  # as a kill between two renames leaves it
    with pytest.raises(ValueError, match="`max_shard_bytes`"):
        prune_checkpoint(base, uneven_plan(base, 1), small, max_shard_bytes=0)
    assert fingerprint(small) == before


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    plan = uneven_plan(base)
    run = tmp_path / "run"
    plan.save(run)  # a run folder holds a plan too
    (run / "metrics.csv").write_text("step,loss\n")
    for folder in (base, run):
        before = sorted(folder.iterdir())
        with pytest.raises(ValueError, match="is not what Secateur writes|is the base model"):
            prune_checkpoint(base, plan, folder)
        assert sorted(folder.iterdir()) == before
    (tmp_path / "empty").mkdir()
    prune_checkpoint(base, plan, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_plan_for_another_base_is_refused(tmp_path: Path) -> None:
    base, other = tiny_folder(tmp_path / "base"), tiny_folder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="give the base model that the plan was made for"):
        prune_checkpoint(base, uneven_plan(other), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    tensors = load_file(base / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / WEIGHTS)
    plan = uneven_plan(base)
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj"):
        prune_checkpoint(base, plan, tmp_path / "small")


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    tensors = load_file(base / WEIGHTS)
    packed = tensors["model.layers.0.mlp.up_proj.weight"].view(-1, 1)
    save_file(tensors | {"model.layers.0.mlp.up_proj.weight": packed}, base / WEIGHTS)
    with pytest.raises(ValueError, match=r"in shape \[888, 1\], and config.json makes it"):
        prune_checkpoint(base, uneven_plan(base), tmp_path / "small")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_checkpoint_of_packed_weights_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    tensors = load_file(base / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, base / WEIGHTS)
    with pytest.raises(ValueError, match="up_proj.weight' in (I8|F8_E4M3); is it quantised"):
        prune_checkpoint(base, uneven_plan(base), tmp_path / "small")


@pytest.mark.parametrize("number", ["inf", "5GB"])
def test_the_command_says_what_a_number_of_bytes_is(number: str) -> None:
    with pytest.raises(UsageError, match=f"a number of bytes such as 2e9, got '{number}'"):
        rewrite.main(["base", "plan", "out", "--max-shard-bytes", number])


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    with pytest.raises(ValueError, match="`max_shard_bytes` must be 1 or more, got 0"):
        prune_checkpoint(base, uneven_plan(base), tmp_path / "small", max_shard_bytes=0)


def test_a_full_plan_leaves_the_stock_model(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    plan = full_plan(skeleton(AutoConfig.from_pretrained(base)), fingerprint(base))
    prune_checkpoint(base, plan, tmp_path / "same")
    dense, same = tensors_of(base), tensors_of(tmp_path / "same")
    assert dense.keys() == same.keys()
    assert all(torch.equal(dense[name], same[name]) for name in dense)
    configs = [json.loads((f / "config.json").read_text()) for f in (base, tmp_path / "same")]
    older = {"rope_theta": 10_000.0, "torch_dtype": "float32"}
    assert configs[0] | older == configs[1]
    assert not list((tmp_path / "same").glob("*.py"))


def test_a_stock_model_of_ours_is_replaced_and_a_base_model_with_a_plan_is_not(
    tmp_path: Path,
) -> None:
    base, small = tiny_folder(tmp_path / "base"), tmp_path / "small"
    prune_checkpoint(base, uniform_plan(base, 0.8), small)
    assert not list(small.glob("*.py"))
    prune_checkpoint(base, uneven_plan(base), small)
    prune_checkpoint(base, uniform_plan(base, 0.7), small)
    other = tiny_folder(tmp_path / "other", seed=1)
    uniform_plan(other).save(other)
    with pytest.raises(ValueError, match="is not what Secateur writes there"):
        prune_checkpoint(base, uniform_plan(base), other)


def test_the_command_does_what_the_function_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_folder(tmp_path / "base")
    uneven_plan(base).save(tmp_path / "plan")
    places = [str(tmp_path / name) for name in ("base", "plan", "small")]
    rewrite.main([*places, "--max-shard-bytes", "2e4"])
    assert f"is in {tmp_path / 'small'}." in capsys.readouterr().out
    prune_checkpoint(base, uneven_plan(base), tmp_path / "same", max_shard_bytes=20_000)
    assert content(tmp_path / "same") == content(tmp_path / "small")


def test_the_command_blames_the_wrong_base_whatever_else_follows_from_it(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    other = tiny_folder(tmp_path / "other", intermediate_size=38)  # of other shapes, too
    uneven_plan(base).save(tmp_path / "plan")
    with pytest.raises(ValueError, match="give the base model that the plan was made for"):
        rewrite.main([str(other), str(tmp_path / "plan"), str(tmp_path / "small")])
    assert not (tmp_path / "small").exists()


def with_new_weights(base: Path, folder: Path) -> None:
    store = BlockStore(folder.with_name("store"))
    recipe = WeightRecipe(Unstructured(0.5), Magnitude())
    found = prune_weights(StreamedBlocks(base), recipe, store=store)
    write_pruned_checkpoint(base, store, found.masks, folder)


VERBS: dict[str, Callable[[Path, Path], object]] = {
    "masks": lambda base, out: prune_checkpoint(base, uneven_plan(base), out),
    "depth": lambda base, out: prune_blocks(base, out, remove=[1]),
    "weights": with_new_weights,
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_proves_what_it_has_written_and_tells_so(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_folder(tmp_path / "base")
    figures = {"parameters": 9, "flops_per_token": 90, "perplexity": {"validation": 5.0}}
    stage = {"base": "the first", "provenance": {}, "context_tokens": 16}
    stage |= {"models": {"dense": figures, "pruned": figures}}
    (base / MARK).write_text(json.dumps({"stages": [stage]}))
    VERBS[verb](base, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`the first`, pruned ({verb}) by Secateur." in card
    assert "bit by bit" in card
    assert "No model was run." in card
    assert read_stages(tmp_path / "out") == [stage]  # those of the base go on
    assert BaseModel(tmp_path / "out").load().num_parameters() > 0

    def damaged(made: Any, folder: Path, *more: Any) -> None:
        files.write_tensors(made, folder, *more)
        wrong = bytearray((folder / WEIGHTS).read_bytes())
        wrong[-9] ^= 1
        (folder / WEIGHTS).write_bytes(wrong)

    monkeypatch.setattr(sources, "write_tensors", damaged)
    before = content(tmp_path / "out")
    with pytest.raises(ExportError, match="not what it should be to the bit: 1 of"):
        VERBS[verb](base, tmp_path / "out")
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("num_files", [1, 3])
def test_files_are_those_of_the_library(num_files: int, tmp_path: Path) -> None:
    """Equal bytes, of all types that a model may have, whatever their sizes."""
    types = {"F32": torch.float32, "I64": torch.int64, "BF16": torch.bfloat16}
    types |= {"F16": torch.float16, "F64": torch.float64}
    values = {
        f"{number}.{name}": torch.full((number,) * (number % 3), 0.5).to(dtype)
        for number in range(num_files, 12)
        for name, dtype in types.items()
    }

    def made(names: Sequence[str]) -> list[files.Made]:
        return [
            files.Made(name, name.split(".")[1], tuple(values[name].shape), values[name].clone)
            for name in sorted(names)
        ]

    groups = [list(values)[place::num_files] for place in range(num_files)]
    files.write_tensors([made(group) for group in groups], tmp_path)
    written = sorted(tmp_path.glob("*.safetensors"))
    for file, group in zip(written, groups, strict=True):
        save_file({n: values[n] for n in group}, tmp_path / "other", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "other").read_bytes()
