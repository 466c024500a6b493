"""Save a sharded model tensor by tensor, without gathering the complete model on any rank.

Every tensor is gathered separately, with its low-rank update; rank 0 writes it and all ranks free
it. The files equal those that `save_pretrained` would write of the complete model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.pruning.checksums import tensor_checksum
from secateur.pruning.files.headers import INDEX
from secateur.pruning.files.model_folder import SHARD_BYTES, write_json
from secateur.pruning.files.shares import numel_of
from secateur.pruning.lora import adapted, added_up

Whole = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Gathers some parameters on every rank, for the duration of a `with` block."""


def write_gathered(
    model: PreTrainedModel,
    folder: Path | None,
    dtype: torch.dtype,
    whole: Whole,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights and configuration of a live model; every rank has to call it.

    Memory: one file of weights on the rank that writes, one tensor on the others.

    Args:
        model: The model; low-rank updates are merged.
        folder: An empty folder; None on a rank that writes nothing.
        dtype: Type of the weights in the files.
        whole: Gathers parameters.
        max_shard_bytes: Largest weight file in bytes, 1 or more; a larger tensor gets a file of its
            own.

    Raises:
        SafetensorError: Writing failed, for example because the disk is full.
        OSError: The same, or the files differ from what was written.
    """
    weights = _gathered(tensors_to_save(model), whole)
    try:
        if folder is not None:
            _write_weights(model, weights, folder, dtype, max_shard_bytes)
            _write_config(model, folder, dtype)
    finally:
        for _ in weights:  # other ranks gather all tensors, even if writing fails
            pass


def num_parameters(model: PreTrainedModel) -> int:
    """Number of parameters of a live model, sharded or not, without its low-rank updates."""
    saved = (value for value, _ in tensors_to_save(model).values())
    return sum(numel_of(value) for value in saved if isinstance(value, nn.Parameter))


def tensors_to_save(model: PreTrainedModel) -> dict[str, tuple[Tensor, Any]]:
    """Tensors to save, by their names in a model without updates, tied tensors once; each with the
    layer that has its update, or None.
    """
    layers = adapted(model).values()
    updated = {layer.get_base_layer().weight: layer for layer in layers}
    bases = {p for layer in layers for p in layer.get_base_layer().parameters()}
    seen = {p for layer in layers for p in layer.parameters()} - bases  # the updates themselves
    saved: dict[str, tuple[Tensor, Any]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if value not in seen:
            saved[name.replace(".base_layer.", ".")] = value, updated.get(value)
            seen.add(value)
    return saved


def updated_sums(model: PreTrainedModel, whole: Whole, dtype: torch.dtype) -> dict[str, str]:
    """Checksums of the weights with low-rank updates, added up, by name; every rank has to call it.

    Args:
        model: The model.
        whole: Gathers parameters.
        dtype: Type of the weights in the files.
    """
    updated = {name: both for name, both in tensors_to_save(model).items() if both[1] is not None}
    return {
        name: tensor_checksum({name: weight.to(stored_type(weight, dtype))})
        for name, weight in _gathered(updated, whole)
    }


def _gathered(
    tensors: Mapping[str, tuple[Tensor, Any]], whole: Whole
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and complete tensors; each is freed when the next is requested."""
    for name, (value, layer) in tensors.items():
        parts = [value] if layer is None else [*layer.parameters()]
        with whole([part for part in parts if isinstance(part, nn.Parameter)]):
            weight = value.data if layer is None else added_up(layer)
            assert weight.numel() == numel_of(value), name
            yield name, weight


def _write_weights(
    model: PreTrainedModel,
    weights: Iterator[tuple[str, Tensor]],
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    shapes = {
        name: torch.empty(
            getattr(value, "ds_shape", value.shape), dtype=stored_type(value, dtype), device="meta"
        )
        for name, (value, _) in tensors_to_save(model).items()
    }
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_bytes)
    unwritten: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, weight in weights:
        file = split.tensor_to_filename[name]
        unwritten[file][name] = weight.to("cpu", stored_type(weight, dtype), copy=True)
        if len(unwritten[file]) == len(split.filename_to_tensors[file]):
            _save(unwritten.pop(file), folder / file)
    if split.is_sharded:
        metadata = {"total_parameters": num_parameters(model), **split.metadata}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": split.tensor_to_filename})


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    with safe_open(path, framework="pt") as file:  # logits of narrow types can hide this
        for name, tensor in tensors.items():
            if not torch.equal(file.get_tensor(name), tensor):
                raise OSError(
                    f"{path} does not contain {name!r} as it was written: the weight has become "
                    "NaN, or the disk is damaged."
                )


def stored_type(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor in the files; indices keep theirs."""
    return dtype if weight.is_floating_point() else weight.dtype


def _write_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
