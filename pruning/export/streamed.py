"""Models streamed from their files: every layer is read for its computation, then freed.

Memory holds one layer and the activations, whatever the size of the model, so that exports of
models larger than memory are verified in float32. Transformers and accelerate read the files; a
forward pass reads them once, from the page cache if they fit there.

Legend: B = windows, T = tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.export.verify import (
    ExportError,
    Said,
    _check_parameters,
    _largest_difference,
    compare_recorded,
)
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.plan import Plan
from secateur.pruning.widths.gate_hooks import GateHooks

# Units of rounding of the largest logit that a saved model may differ from the live one in a type
# narrower than float32. A low-rank update that is not merged changes the order of sums in every
# layer, and the rounding: in bf16, models of 3 to 40 blocks were off by 2 to 11 units.
ROUNDINGS = 24


@contextmanager
def streamed(
    folder: str | Path,
    device: torch.device,
    dtype: torch.dtype | str = "auto",
) -> Iterator[PreTrainedModel]:
    """Load a causal language model in evaluation mode whose weights are streamed from its files.

    Args:
        folder: Model folder.
        device: Device of the computation.
        dtype: Type of the computation; "auto" is that of the files.

    Raises:
        ExportError: The folder cannot be read as a causal language model.
    """
    base = BaseModel(Path(folder))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            places = _places(base.skeleton(), device)
            model = base.load(dtype, device_map=places, offload_folder=scratch)
        except ValueError as error:
            raise ExportError(f"{folder} cannot be loaded: {error}") from error
        yield model.eval()


def verify_streamed(
    base_folder: str | Path,
    plan: Plan,
    folder: str | Path,
    windows_BT: Int[Tensor, "B T"],
    device: torch.device,
    tolerance: float = 1e-4,
) -> float:
    """Compare an exported folder with the masked base model, both read layer by layer, in float32.

    Args:
        base_folder: The base model, not quantised.
        plan: The plan that was exported.
        folder: The exported model.
        windows_BT: Token ids, at least 2 per window.
        device: Device of both computations.
        tolerance: Largest difference of two logits, as for
            `secateur.pruning.export.verify.verify_export`.

    Returns:
        The largest absolute difference of two logits.

    Raises:
        ExportError: As for `verify_export`.
    """
    with (
        streamed(base_folder, device, torch.float32) as dense,
        streamed(folder, device, torch.float32) as exported,
        torch.no_grad(),
    ):
        stored = BaseModel(Path(folder)).dtype_of()
        _check_parameters(dense, plan, exported)
        hooks = GateHooks(dense, plan.family)
        with hooks.applied(plan.gates(), plan.gains):
            return _largest_difference(
                dense,
                exported,
                windows_BT.to(device),
                "masked one",
                torch.float32 if plan.gains is None else stored,
                tolerance,
                plan.kept_blocks(),
            )


def verify_recorded(
    said: Sequence[Said],
    num_parameters: int,
    dtype: torch.dtype,
    folder: str | Path,
    device: torch.device,
    tolerance: float = 1e-4,
) -> float:
    """Compare a saved folder, read layer by layer, in float32, with recorded logits of the live
    model.

    Args:
        said: Result of `secateur.pruning.export.verify.record` for the live model.
        num_parameters: Number of its parameters.
        dtype: Type of its computation.
        folder: The saved model.
        device: Device of the computation.
        tolerance: Largest difference of two logits, above 0, as a fraction of the largest one,
            if both are float32; otherwise rounding of the narrower type allows more.

    Returns:
        The largest absolute difference of two logits.

    Raises:
        ExportError: The folder cannot be loaded, has another number of parameters, or computes
            something else.
    """
    with streamed(folder, device, torch.float32) as saved:
        if (found := saved.num_parameters()) != num_parameters:
            raise ExportError(
                f"The saved model has {found} parameters and the trained one {num_parameters}."
            )
        stored = BaseModel(Path(folder)).dtype_of()
        narrow = max(dtype, stored, key=lambda kind: torch.finfo(kind).eps)
        largest = max(1.0, *(float(answer.logits_BtV.abs().max()) for answer in said))

        share = tolerance if narrow == torch.float32 else ROUNDINGS * torch.finfo(narrow).eps
        return compare_recorded(
            said,
            saved,
            "trained one",
            share * largest,
            lambda _: "Export it again: `--ckpt_path last`.",
        )


def _places(model: Any, device: torch.device) -> dict[str, str]:
    """Device map: all modules on disk except the smallest, which sets the device to compute on."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    parts = dict(decoder.named_children())
    smallest = min(parts, key=lambda name: sum(p.numel() for p in parts[name].parameters()))
    places = {name: "disk" for name, _ in model.named_children() if name != prefix.split(".")[0]}
    here = "cpu" if device.type == "cpu" else str(device)  # an indexed CPU is refused
    return places | {f"{prefix}.{name}": here if name == smallest else "disk" for name in parts}
