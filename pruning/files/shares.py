"""Read this rank's share of a model from its files; no rank ever holds the complete model.

A share is a range of the entries of every flattened tensor. The files are memory-mapped: only the
share is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur.pruning.files.base_model import BaseModel

Share = Callable[[nn.Parameter], tuple[Tensor, int]]
"""From a parameter to this rank's share (flat), and the index of its first entry."""


def read_shares(model: nn.Module, base: BaseModel, share: Share) -> None:
    """Fill the shares of all parameters of a model, and its buffers, from its files.

    Args:
        model: The model; tied parameters are read once. Every rank gets complete buffers.
        base: The base model.
        share: Finds the share of a parameter.

    Raises:
        ValueError: The files lack a tensor of the model, or it has another size there.
    """
    with ExitStack() as stack, torch.no_grad():
        files = {
            path: stack.enter_context(safe_open(path, framework="pt")) for path in base.weight_files
        }
        for names, parameter in _by_parameter(model):
            name = next((name for name in names if name in base.headers), None)
            if name is None:
                raise ValueError(
                    f"{base.folder} has no tensor {' or '.join(names)}; is it complete?"
                )
            target, start = share(parameter)
            tensor = files[base.headers[name].path].get_slice(name)
            numel = prod(tensor.get_shape())
            if numel != numel_of(parameter):
                raise ValueError(
                    f"{base.folder} has {numel} entries in {name}, its config.json implies "
                    f"{numel_of(parameter)}."
                )
            stop = min(start + target.numel(), numel)
            if start < stop:
                target[: stop - start].copy_(flat_range(tensor, start, stop))
        for name, buffer in model.named_buffers():
            if name in base.headers:  # those of a narrow model; others are computed
                buffer.copy_(files[base.headers[name].path].get_tensor(name))


def flat_range(tensor: Any, start: int, stop: int) -> Tensor:
    """Entries start to stop of a flattened tensor in a file; reads complete rows.

    Args:
        tensor: Result of `get_slice` of an open safetensors file.
        start: First entry, 0 or more.
        stop: Entry after the last one, above `start`.
    """
    shape = tensor.get_shape()
    row = prod(shape[1:])
    first = start // row
    rows: Tensor = tensor[first : -(-stop // row)] if shape else tensor[:]
    return rows.flatten()[start - first * row : stop - first * row]


def numel_of(parameter: Any) -> int:
    """Number of entries of a parameter, also when DeepSpeed has sharded it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _by_parameter(model: nn.Module) -> Iterator[tuple[list[str], nn.Parameter]]:
    """Every parameter once, with all its names."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, of_parameter in names.items():
        yield of_parameter, parameter
