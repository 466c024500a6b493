"""Sparse models on disk and on the GPU.

On disk they are stock models of their family: safetensors with zeros, of unchanged size, and packed
masks, one bit per weight. The compressed formats `sparse-bitmask` and
`sparse-24-bitmask` of the package compressed-tensors are not written: transformers 5.23 requires
version 0.15 or newer, which no longer decompresses them (in 0.20 the matrices are random).

On CUDA, matrices whose zeros and shape a 2:4 kernel can use are packed by torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.finish import finish
from secateur.pruning.files.headers import INDEX
from secateur.pruning.files.model_folder import CONFIG, replaced_folder, write_json
from secateur.pruning.weights.masks import FILE, WeightMasks
from secateur.pruning.weights.sparsity import fits_2of4
from secateur.pruning.weights.store import BlockStore

MASKS = "masks"  # a subfolder, so that nothing loads masks as weights


def is_masked_model(folder: Path) -> bool:
    """Test whether a folder is a model with its masks, written by `write_pruned_checkpoint`."""
    return (folder / "config.json").is_file() and (folder / MASKS / FILE).is_file()


def write_pruned_checkpoint(
    base_folder: str | Path,
    store: BlockStore,
    masks: WeightMasks,
    folder: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a checkpoint in which the finished blocks of a run replace the original ones.

    Files, shards and types are those of the checkpoint; its tensors are streamed, one file at a
    time. The folder appears when everything is written; on any failure it is removed.

    Args:
        base_folder: Model folder that was pruned.
        store: The finished blocks, all of them.
        masks: The masks; written to the subfolder `masks`.
        folder: Folder of the sparse model.
        progress: Called with the numbers of files written and of all files.

    Raises:
        ValueError: The blocks or masks are of another model, a block is not finished, or something
            else exists at `folder`.
    """
    base = BaseModel(Path(base_folder))
    prefix, files = f"{base.family.blocks}.", base.weight_files
    _refuse_other_base(base, store, masks)
    with replaced_folder(folder, is_masked_model) as partial:
        for number, path in enumerate(files, start=1):
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            for name in tensors:
                block, _, relative = name.removeprefix(prefix).partition(".")
                if name.startswith(prefix) and name in masks:
                    tensors[name] = store.weight(int(block), relative).to(tensors[name].dtype)
            save_file(tensors, partial / path.name, metadata={"format": "pt"})
            if progress is not None:
                progress(number, len(files))
        if (index := base.folder / INDEX).is_file():
            shutil.copyfile(index, partial / INDEX)
        write_json(partial / CONFIG, base.settings)
        finish(partial, base.folder)
        masks.save(partial / MASKS)


def _refuse_other_base(base: BaseModel, store: BlockStore, masks: WeightMasks) -> None:
    if store.settings.get("model") != base.fingerprint:
        raise ValueError(
            f"`store` {store.folder} holds no blocks of {base.folder}: another model was pruned, "
            "or this one in memory, or it has changed since. Give the folder that StreamedBlocks "
            "read; write a model in memory by its `save_pretrained`."
        )
    if missing := [name for name in masks if name not in base.tensors]:
        raise ValueError(
            f"`masks` name {len(missing)} tensors that {base.folder} lacks, {missing[0]!r} first; "
            "give those that `prune_weights` returned."
        )


@torch.no_grad()
def to_semi_structured(model: nn.Module, masks: WeightMasks) -> list[str]:
    """Pack every matrix of a live model that a 2:4 kernel can use, for inference on CUDA.

    Args:
        model: A model on CUDA, float16 or bfloat16.
        masks: Its masks.

    Returns:
        The names of the packed parameters.

    Raises:
        ValueError: The model is not on CUDA or has another type, or no matrix qualifies.
    """
    fitting = [name for name in masks if fits_2of4(masks[name])]
    if not fitting:
        raise ValueError(
            "No matrix has 2 zeros in every 4 inputs and a shape of multiples of 32 x 64: a 2:4 "
            "kernel can use none. Prune with NM(2, 4) along the inputs."
        )
    for name in fitting:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, attribute)
        if weight.device.type != "cuda" or weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is {weight.dtype} on {weight.device.type}; 2:4 kernels take float16 or "
                "bfloat16 on CUDA: move the model there first."
            )
        sparse = torch.sparse.to_sparse_semi_structured(weight * masks[name].to(weight.device))
        setattr(module, attribute, nn.Parameter(sparse, requires_grad=False))
    return fitting
