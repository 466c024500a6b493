"""Whether the files of a model hold the model that its configuration makes, told by their headers.

What is wrong here would otherwise be random weights, weights of another model, or an export that
fails after all training.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import Family
from secateur.pruning.files.headers import Header, read_tensor
from secateur.pruning.files.model_folder import in_block

_FLOATS = ("F64", "F32", "F16", "BF16")
# Tables that old versions of transformers saved and every version computes.
_COMPUTED = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$")
_UPDATES = re.compile(r"\.lora_[AB]\.|\.lora_embedding_|\.base_layer\.")
_PACKED = re.compile(r"\.(?:weight_scale\w*|qweight|qzeros|scales|SCB|absmax|weight_packed)$")
_SAVE = "load it by AutoModelForCausalLM and save it with `save_pretrained`"


def judge_blocks(folder: Path, family: Family, headers: Mapping[str, Header], count: int) -> None:
    """Refuse files that have more or fewer blocks than the configuration says.

    Args:
        folder: Where they lie, for the message.
        family: The row of the family.
        headers: What the files say of their tensors.
        count: What `num_hidden_layers` says.

    Raises:
        ValueError: They do.
    """
    blocks = {block for name in headers if (block := in_block(family, name)[0]) >= 0}
    if blocks and max(blocks) + 1 != count:
        raise ValueError(
            f"{folder} holds blocks 0 to {max(blocks)}, and `num_hidden_layers` of its config.json "
            f"is {count}; fetch or save the model again."
        )


def judge(
    folder: Path, family: Family, headers: Mapping[str, Header], model: PreTrainedModel
) -> None:
    """Refuse files that are not the weights of a model: names, shapes, types, ties, indices.

    Args:
        folder: Where they lie, for the message.
        family: The row of the family.
        headers: What the files say of their tensors.
        model: The model that the configuration makes, on the meta device.

    Raises:
        ValueError: They are not.
    """
    expected = model.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        tied.setdefault(id(tensor), []).append(name)
    missing = [names[0] for names in tied.values() if headers.keys().isdisjoint(names)]
    extra = [name for name in headers if name not in expected and not _COMPUTED.search(name)]
    if missing or extra:
        raise ValueError(_names_differ(folder, family.model_type, missing, extra))
    for name in expected.keys() & headers.keys():
        _judge_one(headers[name], name, expected[name])
    for names in tied.values():
        _judge_tied(folder, [name for name in names if name in headers], headers)
    if family.narrow:
        for name in headers.keys() & expected.keys():
            site = family.index_buffers.get(in_block(family, name)[1])
            if site is not None and in_block(family, name)[0] >= 0:
                _judge_index(name, headers[name], int(model.config.hidden_size))


def _names_differ(
    folder: Path, model_type: str, missing: Collection[str], extra: Collection[str]
) -> str:
    kind = f"a {model_type!r} causal language model"
    if any(map(_UPDATES.search, extra)):
        return (
            f"{folder} holds low-rank updates beside the weights; add them up with "
            "`merge_and_unload` of peft and save the model."
        )
    if packed := [name for name in extra if _PACKED.search(name)]:
        return (
            f"{folder} has {packed[0]!r} and so is quantised; give the original weights, which "
            "alone can be trained and cut."
        )
    for name in missing:
        other = next((e for e in extra if e.endswith(f".{name}") or name.endswith(f".{e}")), None)
        if other is not None:
            return (
                f"{folder} calls {other!r} what is {name!r} in {kind}; {_SAVE}, without wrappers."
            )
    if missing:
        return (
            f"{folder} lacks {len(missing)} tensors of {kind}, {next(iter(missing))!r} first; "
            "fetch or save it again as a causal language model."
        )
    return (
        f"{folder} has {len(extra)} tensors that are in no model of its config.json, "
        f"{next(iter(extra))!r} first; is the configuration that of another model?"
    )


def _judge_one(header: Header, name: str, expected: Tensor) -> None:
    if header.shape != tuple(expected.shape):
        raise ValueError(
            f"{header.path} has {name!r} in shape {list(header.shape)}, and config.json makes it "
            f"{list(expected.shape)}; is the configuration that of another model?"
        )
    known = _FLOATS if expected.is_floating_point() else ("I64",)
    if header.dtype not in known:
        raise ValueError(
            f"{header.path} has {name!r} in {header.dtype}; is it quantised? Its scales would be "
            "lost. Give the original weights, in 16 or 32 bits."
        )


def _judge_tied(folder: Path, names: list[str], headers: Mapping[str, Header]) -> None:
    """One tensor under several names is the same under all of them."""
    first = None
    for name in names if len(names) > 1 else []:
        tensor = read_tensor(headers[name].path, name)
        first = tensor if first is None else first
        if not torch.equal(first, tensor):
            raise ValueError(
                f"{folder} has other numbers in {name!r} than in {names[0]!r}, which its config "
                "ties (`tie_word_embeddings`). If they were trained apart, set that to false in "
                "config.json; else remove the wrong one."
            )


def _judge_index(name: str, header: Header, size: int) -> None:
    index_W = read_tensor(header.path, name)
    rising = bool((index_W[1:] > index_W[:-1]).all())
    if not rising or int(index_W[0]) < 0 or int(index_W[-1]) >= size:
        raise ValueError(
            f"{header.path} has {name!r} that are not indices in rising order below {size}; export "
            "the model again."
        )
