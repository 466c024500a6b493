"""Prove an export to the bit: names, shapes, types, weights, indices and configuration.

Whole tensors of the base model are multiplied by their gains, rounded to the type of the file, and
only then indexed, by entries of a site: another way than that of `secateur.pruning.export.slices`,
which writes them. Logits cannot do this; in a narrow type, weights that are a few percent off pass
for roundings.

Memory: one tensor of the base model in float32.

Legend: W = kept entries of a site, F = entries of a tensor or of a share of it, flat.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.pruning.checksums import tensor_checksum
from secateur.pruning.export.configuration import exported_config
from secateur.pruning.export.gathered_weights import stored_type, tensors_to_save
from secateur.pruning.export.verify import ExportError
from secateur.pruning.files.base_model import BaseModel, config_of
from secateur.pruning.files.finish import for_older_readers
from secateur.pruning.files.headers import read_tensor
from secateur.pruning.files.model_folder import in_block
from secateur.pruning.files.shares import Share, flat_range, numel_of
from secateur.pruning.plan import Plan

# What tells of the making of a model; and what `rope_parameters` has, for older readers.
_NOT_COMPARED = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_theta",
    "secateur",
    "torch_dtype",
    "transformers_version",
)


def prove_cut(base: BaseModel, plan: Plan, folder: Path) -> None:
    """Compare the files of an export with those of its base model, bit by bit.

    Args:
        base: The base model.
        plan: The plan that was exported.
        folder: The exported model.

    Raises:
        ExportError: A tensor or a setting is missing, too many, or not what the plan makes of it.
    """
    prove_files(_expected(base, plan), exported_config(base, plan), folder)


def prove_files(
    expected: Mapping[str, Callable[[], Tensor]], settings: dict[str, Any], folder: Path
) -> None:
    """Compare the files of a model with the tensors that they should hold, bit by bit.

    Args:
        expected: Name of every tensor to a function that makes it.
        settings: What config.json should say.
        folder: The model.

    Raises:
        ExportError: A tensor or a setting is missing, too many, or another.
    """
    exported = _opened(folder)
    _same_names(exported, expected.keys())
    for name, make in expected.items():
        _same_bits(name, read_tensor(exported.headers[name].path, name), make())
    _same_settings(exported.config, config_of(settings | for_older_readers(settings), folder))


def prove_saved(model: PreTrainedModel, folder: Path) -> None:
    """Compare the files of a saved model with the live model, bit by bit.

    Args:
        model: The live model, in the type in which it was saved.
        folder: The saved model.

    Raises:
        ExportError: A tensor or a setting differs.
    """
    saved, live = _opened(folder), model.state_dict()
    for name, header in saved.headers.items():
        if name not in live:
            raise ExportError(f"The saved model has {name!r}, which the live one has not.")
        _same_bits(name, read_tensor(header.path, name), live[name].cpu())
    if saved.config.model_type == model.config.model_type:  # else halves of blocks have gone
        _same_settings(saved.config, model.config)


def prove_shares(
    model: PreTrainedModel, share: Share, sums: Mapping[str, str], dtype: torch.dtype, folder: Path
) -> None:
    """Compare the files of a saved model with this rank's share of the live one, bit by bit.

    Nothing is gathered: each rank reads the entries that it holds, so that all ranks together
    compare all of them.

    Args:
        model: The live model, sharded.
        share: Finds this rank's share of a parameter.
        sums: Checksums of the weights with low-rank updates, see `updated_sums`.
        dtype: Type in which the weights were saved.
        folder: The saved model.

    Raises:
        ExportError: A tensor or a setting differs.
    """
    saved, live = _opened(folder), tensors_to_save(model)
    _same_names(saved, live.keys())
    for name, (value, _) in live.items():
        path = saved.headers[name].path
        if name in sums:
            if tensor_checksum({name: read_tensor(path, name)}) != sums[name]:
                raise ExportError(f"{name!r} is not the sum of weights and updates to the bit.")
            continue
        # Every rank has all of a buffer.
        own_F, start = share(value) if isinstance(value, nn.Parameter) else (value.flatten(), 0)
        stop = min(start + own_F.numel(), numel_of(value))
        if start < stop:
            own_F = own_F[: stop - start].to("cpu", stored_type(value, dtype))
            with safe_open(path, framework="pt") as file:
                found_F = flat_range(file.get_slice(name), start, stop)
            _same_bits(name, found_F, own_F)
    if saved.config.model_type == model.config.model_type:
        _same_settings(saved.config, model.config)


def _opened(folder: Path) -> BaseModel:
    exported = BaseModel(folder)
    try:
        exported.judge()
    except ValueError as error:
        raise ExportError(f"{folder} cannot be loaded: {error}") from error
    return exported


def _expected(base: BaseModel, plan: Plan) -> dict[str, Callable[[], Tensor]]:
    """Name of every tensor of the smaller model to a function that makes it."""
    family, keep = plan.family, plan.kept_blocks()
    found: dict[str, Callable[[], Tensor]] = {}
    for name, path in base.tensors.items():
        block, relative = in_block(family, name)
        make = partial(_cut, path, name, plan)
        if block < 0:
            found[name] = make
            continue
        part = family.part_of_tensor(relative)
        if any(plan.keeps(block, of) for of in ([part] if part else ("attn", "mlp"))):
            found[f"{family.blocks}.{keep.index(block)}.{relative}"] = make
    for site, index_W in zip(plan.sites, plan.kept, strict=True):
        buffers = [b for b, name in family.index_buffers.items() if name == site.name]
        for buffer in buffers if 0 < len(index_W) < site.size else []:
            name = f"{family.blocks}.{keep.index(site.block)}.{buffer}"
            found.setdefault(name, index_W.clone)
    return found


def _cut(path: Path, name: str, plan: Plan) -> Tensor:
    """What a plan makes of a whole tensor of a file: gains first, then entries."""
    tensor, (block, relative) = read_tensor(path, name), in_block(plan.family, name)
    if block < 0:
        return tensor
    gains = [(plan.gains or {}).get(f"{block}.{axis}") for axis in plan.family.gain_axes(relative)]
    if any(gain_F is not None for gain_F in gains):
        scaled = tensor.float()
        for axis, gain_F in enumerate(gains):
            if gain_F is not None:
                outputs_of_matrix = axis == 0 and tensor.dim() == 2
                scaled = scaled * (gain_F[:, None] if outputs_of_matrix else gain_F)
        tensor = scaled.to(tensor.dtype)
    for axis, site in enumerate(plan.family.axes(relative)):
        if site is not None:
            index_W, size = plan.index(block, site), plan.size(block, site)
            if len(index_W) < size:
                entries = tensor.unflatten(axis, (size, -1))
                entries = entries[index_W] if axis == 0 else entries[:, index_W]
                tensor = entries.flatten(axis, axis + 1)
    return tensor


def _same_names(exported: BaseModel, expected: Collection[str]) -> None:
    if wrong := sorted(exported.headers.keys() ^ set(expected)):
        where = "lacks" if wrong[0] in expected else "has"
        raise ExportError(f"The exported model {where} {wrong[0]!r}, unlike what it should have.")


def _same_bits(name: str, own: Tensor, wanted: Tensor) -> None:
    if (own.dtype, own.shape) != (wanted.dtype, wanted.shape):
        raise ExportError(
            f"{name!r} is {own.dtype} of shape {list(own.shape)} in the export, and should be "
            f"{wanted.dtype} of shape {list(wanted.shape)}."
        )
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[own.element_size()]  # NaN is NaN
    bits = [t.contiguous().flatten().view(integer) for t in (own, wanted)]
    if not torch.equal(*bits):
        differ = (own != wanted).sum()
        raise ExportError(
            f"{name!r} is not what it should be to the bit: {int(differ)} of {own.numel()} entries "
            f"differ, the first difference is at {_first(own, wanted)}."
        )


def _first(own: Tensor, wanted: Tensor) -> list[int]:
    return [int(at) for at in (own != wanted).nonzero()[:1].flatten()]


def _same_settings(own: PreTrainedConfig, wanted: PreTrainedConfig) -> None:
    ours, theirs = dict(_compared(own)), dict(_compared(wanted))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ExportError(
                f"`{name}` in the exported config.json is {ours.get(name)!r} and should be "
                f"{theirs.get(name)!r}."
            )


def _compared(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    fields: Mapping[str, Any] = config.to_dict()
    for name, value in fields.items():
        if name not in _NOT_COMPARED:
            yield name, value
