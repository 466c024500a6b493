"""Every way in which a base can be another model than it says, and what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.folder_checks import leads_out
from tests.pruning.export.plans import uneven_plan
from tests.tiny import tiny_folder

Tensors = dict[str, Tensor]
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
Q, UP, EMBED = "model.layers.1.self_attn.q_proj.weight", "mlp.up_proj.weight", "model.embed_tokens"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untied, a tied and a narrow model."""
    root = tmp_path_factory.mktemp("made")
    untied = tiny_folder(root / "untied")
    prune_checkpoint(untied, uneven_plan(untied), root / "narrow")
    (root / "narrow" / "secateur.json").unlink()  # which tells what has been changed since
    return {
        "untied": untied,
        "tied": tiny_folder(root / "tied", tie_word_embeddings=True),
        "narrow": root / "narrow",
    }


def copied(made: dict[str, Path], kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[kind], tmp_path / "base"))


def change_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], None]:
    def rename(tensors: Tensors) -> None:
        for name in [*tensors]:
            tensors[change(name)] = tensors.pop(name)

    return rename


def as_type(dtype: torch.dtype, name: str = Q) -> Callable[[Tensors], None]:
    return lambda t: t.update({name: t[name].to(dtype)})


# What is done to the tensors, of which model, and what is said of it.
TENSORS: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "no q_proj": ("untied", lambda t: t.pop(Q), f"lacks 1 tensors of a 'llama' .*'{Q}' first"),
    "untied, no head": ("untied", lambda t: t.pop("lm_head.weight"), "lacks .*'lm_head.weight'"),
    "tied, no embeddings": ("tied", lambda t: t.pop(f"{EMBED}.weight"), "lacks 1 tensors"),
    "no norm": ("untied", lambda t: t.pop(NORM), f"lacks 1 tensors .*'{NORM}'"),
    "no index": (
        "narrow",
        lambda t: t.pop("model.layers.2.attn_out.index"),
        "lacks 1 tensors .*attn_out.index",
    ),
    "one block more": (
        "untied",
        lambda t: t.update({n.replace("s.2.", "s.3."): t[n].clone() for n in [*t] if "s.2." in n}),
        "holds blocks 0 to 3, and `num_hidden_layers` of its config.json is 3",
    ),
    "one block less": (
        "untied",
        lambda t: [t.pop(n) for n in [*t] if "layers.2." in n],
        "holds blocks 0 to 1, and `num_hidden_layers` of its config.json is 3",
    ),
    "a hole": (
        "untied",
        lambda t: [t.pop(n) for n in [*t] if "layers.1." in n],
        "lacks 9 tensors",
    ),
    "a bias that no model has": (
        "untied",
        lambda t: t.update({Q.replace("weight", "bias"): torch.ones(24)}),
        "has 1 tensors that are in no model of its config.json",
    ),
    "tied, another head": (
        "tied",
        lambda t: t.update({"lm_head.weight": t[f"{EMBED}.weight"] + 1}),
        "other numbers in .* which its config ties .*set that to false",
    ),
    "without model.": (
        "untied",
        renamed(lambda n: n.removeprefix("model.")),
        "calls 'embed_tokens.weight' what is 'model.embed_tokens.weight' .* without wrappers",
    ),
    "prefix of torch.compile": (
        "untied",
        renamed(lambda n: f"_orig_mod.{n}"),
        "calls '_orig_mod.model.* what is 'model.",
    ),
    "prefix of DDP": ("untied", renamed(lambda n: f"module.{n}"), "calls 'module.model."),
    "prefix of peft": (
        "untied",
        lambda t: t.update({Q.replace("weight", "lora_A.default.weight"): torch.ones(2, 24)}),
        "low-rank updates beside the weights; add them up with `merge_and_unload`",
    ),
    "another shape": (
        "untied",
        lambda t: t.update({Q: t[Q][:-4].clone()}),
        r"in shape \[20, 24\], and config.json makes it \[24, 24\]",
    ),
    "transposed": (
        "untied",
        lambda t: t.update({f"model.layers.0.{UP}": t[f"model.layers.0.{UP}"].T.contiguous()}),
        r"in shape \[24, 37\]",
    ),
    "longer embeddings": (
        "untied",
        lambda t: t.update({f"{EMBED}.weight": torch.ones(321, 24)}),
        r"shape \[321, 24\], and config.json makes it \[320, 24\]",
    ),
    "fp8": ("untied", as_type(torch.float8_e4m3fn), "in F8_E4M3; is it quantised"),
    "integers": ("untied", as_type(torch.int8), "in I8; is it quantised"),
    "scales": (
        "untied",
        lambda t: t.update({f"{Q}_scale": torch.ones(1)}),
        "and so is quantised; give the original weights",
    ),
    "float index": (
        "narrow",
        as_type(torch.float32, "model.layers.2.attn_out.index"),
        "attn_out.index' in F32",
    ),
    "index out of range": (
        "narrow",
        lambda t: t["model.layers.2.attn_out.index"].__setitem__(-1, 24),
        "not indices in rising order below 24",
    ),
    "index twice": (
        "narrow",
        lambda t: next(i for n, i in t.items() if "index" in n and len(i) > 1).fill_(3),
        "not indices in rising order below 24",
    ),
}


@pytest.mark.parametrize(("kind", "change", "said"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_not_those_of_the_model(
    kind: str, change: Callable[[Tensors], Any], said: str, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(made, kind, tmp_path)
    change_tensors(folder, change)
    for read in (
        BaseModel(folder).judge,
        BaseModel(folder).load,
        lambda: BaseModel(folder).tensors,
    ):
        with pytest.raises(ValueError, match=said):
            read()


def test_what_is_right_is_taken(made: dict[str, Path], tmp_path: Path) -> None:
    for kind in made:
        BaseModel(made[kind]).judge()
    folder = copied(made, "tied", tmp_path)

    def with_copies(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors[f"{EMBED}.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    change_tensors(folder, with_copies)  # as old versions of transformers saved Llama
    ours = BaseModel(folder).load().state_dict()
    theirs = BaseModel(made["tied"]).load().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    change_config(folder, num_hidden_layers=3)
    (folder / "consolidated.safetensors").write_bytes(b"of the makers, in names of their own")
    BaseModel(folder).judge()


# What is done to config.json, and what is said of it.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "more blocks": ({"num_hidden_layers": 4}, "holds blocks 0 to 2, and `num_hidden_layers` .* 4"),
    "fewer blocks": ({"num_hidden_layers": 2}, "holds blocks 0 to 2, and `num_hidden_layers` .* 2"),
    "a million blocks": ({"num_hidden_layers": 10**9}, "holds blocks 0 to 2"),
    "another width": ({"intermediate_size": 40}, r"config.json makes it \[40, 24\]|\[24, 40\]"),
    "biases": ({"attention_bias": True}, "lacks 12 tensors"),
    "tied": ({"tie_word_embeddings": True}, "other numbers in"),
    "heads of no size": ({"num_attention_heads": 0}, "config.json"),
    "a word for a number": ({"hidden_size": "wide"}, "no readable config.json|makes no"),
    "unknown family": ({"model_type": "elm"}, "knows no `model_type` 'elm'. Known here are gemma2"),
    "no family": ({"model_type": None}, "knows no `model_type` 'None'"),
    "unknown family, with code": (
        {"model_type": "elm", "auto_map": {"AutoConfig": "elm.ElmConfig"}},
        "code in a model folder is not run",
    ),
    "images": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        "'gemma3' model of more than text .*Save its text model, 'gemma3_text'",
    ),
    "an encoder": ({"is_encoder_decoder": True}, "an encoder and a decoder"),
}


@pytest.mark.parametrize(("fields", "said"), CONFIGS.values(), ids=CONFIGS)
def test_configurations_that_are_not_those_of_the_files(
    fields: dict[str, Any], said: str, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(made, "untied", tmp_path)
    change_config(folder, **fields)
    with pytest.raises(ValueError, match=said):
        BaseModel(folder).judge()


HOW_TO_RUN: dict[str, Any] = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "torchscript": True,
    "attn_implementation": "attacker/kernel",
    "_attn_implementation": "flash_attention_2",
    "experts_implementation": "attacker/kernel",
    "auto_map": {"AutoModelForCausalLM": "attacker/repo--x.X", "AutoConfig": "x.C"},
    "configuration_files": ["config.9.0.0.json"],
}


@pytest.mark.parametrize("name", HOW_TO_RUN)
def test_a_folder_does_not_say_how_it_is_run(
    name: str, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(made, "untied", tmp_path)
    change_config(folder, **{name: HOW_TO_RUN[name]})
    base, ids_BT = BaseModel(folder), torch.arange(8)[None]
    model, plain = base.load(), BaseModel(made["untied"]).load()
    assert type(model) is type(plain)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids_BT).logits, plain(ids_BT).logits)
    assert model(ids_BT).hidden_states is None
    prune_checkpoint(folder, uneven_plan(folder), tmp_path / "small")
    written = json.loads((tmp_path / "small" / CONFIG).read_text())
    assert written.get(name) != HOW_TO_RUN[name]


# Files of another kind


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "attacker/model"}')


def only(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name in names:
        (folder / name).write_bytes(b"GGUF")


def pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def secret(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / "secret")


KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an adapter in the folder": (adapter, "holds an adapter .* if it is not meant, move it"),
    "only an adapter": (
        lambda f: only(f, "adapter_config.json", "adapter_model.safetensors"),
        "holds an adapter .* `merge_and_unload`",
    ),
    "a folder of GGUF": (
        lambda f: only(f, "model.Q4_K_M.gguf"),
        'Make a model folder of model.Q4_K_M.gguf: .* gguf_file="model.Q4_K_M.gguf"',
    ),
    "GGUF beside its config": (
        lambda f: only(f, "config.json", "a.gguf"),
        "Make a model folder of a.gguf",
    ),
    "pickles": (lambda f: only(f, CONFIG, "pytorch_model.bin"), "only pytorch_model.bin; save the"),
    "a pointer of git-lfs": (pointer, "is a pointer of git-lfs, not the weights; `git lfs pull`"),
    "a licence that leads out": (lambda f: secret(f, "LICENSE"), "the link LICENSE, which leads"),
    "a tokenizer that leads out": (lambda f: secret(f, "tokenizer.json"), "the link tokenizer.j"),
    "a config that leads out": (lambda f: secret(f, CONFIG), "the link config.json, which leads"),
    "a config of nothing": (lambda f: (f / CONFIG).write_text("[1]"), "no readable config.json"),
    "a config of brackets": (lambda f: (f / CONFIG).write_text("[" * 9**6), "no readable"),
    "cut weights": (lambda f: (f / WEIGHTS).write_bytes(b"\x08"), "model.safetensors is damaged"),
}


@pytest.mark.parametrize(("change", "said"), KINDS.values(), ids=KINDS)
def test_folders_of_other_kinds(
    change: Callable[[Path], Any], said: str, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(made, "untied", tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=said):
        BaseModel(folder).judge()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"is a file, not a model folder\. Make a model folder of"):
        BaseModel(str(tmp_path / "a.gguf")).check()


def test_links_of_the_cache_of_the_hub_are_followed(made: dict[str, Path], tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b/snapshots/0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(made["untied"].iterdir()):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    BaseModel(snapshot).judge()
    (tmp_path / "by-name").symlink_to(snapshot)
    BaseModel(tmp_path / "by-name").judge()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "LICENSE").symlink_to(tmp_path / "by-name" / "config.json")
    assert leads_out(tmp_path / "inside" / "LICENSE", tmp_path / "inside")
    assert leads_out(tmp_path / "inside", tmp_path / "inside")


# Several files of weights


def sharded(folder: Path, files: dict[str, str] | None = None) -> dict[str, str]:
    """Divide the weights among two files with an index, or write an index of one's own."""
    tensors = load_file(folder / WEIGHTS)
    names = {
        name: f"model-0000{1 + (name > 'model.layers.1')}-of-00002.safetensors" for name in tensors
    }
    for file in set(names.values()):
        own = {name: tensor for name, tensor in tensors.items() if names[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names | (files or {})}))
    return names


INDICES: dict[str, tuple[Any, str]] = {
    "another folder": (
        {Q: "../outside.safetensors"},
        "names '../outside.safetensors', which is no",
    ),
    "an absolute path": ({Q: "/tmp/outside.safetensors"}, "which is no file of its folder"),
    "a path of Windows": ({Q: "..\\outside.safetensors"}, "which is no file of its folder"),
    "a number": ({Q: 3}, "its `weight_map` names no files"),
    "a file that is not there": ({Q: "model-3.safetensors"}, "lacks model-3.safetensors, which"),
    "the other file": (
        {Q: "model-00001-of-00002.safetensors"},
        f"names '{Q}' in model-00001-of-00002.safetensors, which does not hold it",
    ),
    "a tensor that is not there": (
        {"model.extra": "model-00001-of-00002.safetensors"},
        "names 'model.extra' in .*which does not hold it",
    ),
}


@pytest.mark.parametrize(("files", "said"), INDICES.values(), ids=INDICES)
def test_an_index_that_leads_elsewhere(
    files: dict[str, str], said: str, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(made, "untied", tmp_path)
    save_file({Q: torch.ones(24, 24)}, tmp_path / "outside.safetensors")
    sharded(folder, files)
    for read in (BaseModel(folder).judge, BaseModel(folder).load):
        with pytest.raises(ValueError, match=said):
            read()


def test_several_files_are_read_and_no_others(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made, "untied", tmp_path)
    sharded(folder)
    save_file({Q: torch.ones(24, 24)}, folder / "stray.safetensors")
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"of an earlier save")
    base, plain = BaseModel(folder), BaseModel(made["untied"]).load()
    assert torch.equal(base.load().get_parameter(Q), plain.get_parameter(Q))
    assert {path.name[:11] for path in base.tensors.values()} == {"model-00001", "model-00002"}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"weight_map": {"a": "b"}}',
        '{"metadata": {}, "weight_map": []}',
        '{"metadata": {}, "weight_map": {}}',
        "3",
    ],
)
def test_a_damaged_index_is_told(content: str, made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made, "untied", tmp_path)
    sharded(folder)
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is damaged: "):
        BaseModel(folder).judge()


def test_a_tensor_in_two_files_is_told(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(made, "untied", tmp_path)
    files = sharded(folder)
    second = folder / "model-00002-of-00002.safetensors"
    save_file(
        load_file(second) | {NORM: torch.ones(24), "lm_head.weight": torch.ones(320, 24)}, second
    )
    assert files["lm_head.weight"] != second.name
    with pytest.raises(
        ValueError, match=r"has 'lm_head.weight' twice, in model-00001.* and model-"
    ):
        BaseModel(folder).judge()


def test_a_quantised_model_is_read_to_be_measured_alone(
    made: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(made, "untied", tmp_path)
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    BaseModel(folder).judge()
    with pytest.raises(ValueError, match="is stored quantised .* Give the original weights"):
        _ = BaseModel(folder).tensors
