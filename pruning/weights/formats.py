"""Sparse models on the GPU: torch packs matrices whose zeros and shape a 2:4 kernel can use."""

from __future__ import annotations

import torch
from torch import nn

from secateur.pruning.weights.masks import WeightMasks
from secateur.pruning.weights.sparsity import fits_2of4


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
