"""Verify that an exported model computes the same as the masked dense model.

The logits of complete windows are compared, and those of a cached greedy decode, token by token. Up
to `FLOAT32_PARAMETERS` parameters both models compute in float32, the dense one on a copy if it has
another type: then the two differ only in the order of sums. Weights are first rounded to the type
of the dense model, which may be narrower than that of the checkpoint. Larger models are compared in
the type that they have. Gains are folded into the weights of the copy and rounded as those of the
files are. How far roundings move the logits depends on the model; it is measured, and allows a
difference to match (`rounding_noise`).

Legend: B = windows, T = tokens, V = vocabulary, D = width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from secateur.pruning.costs import Parameters
from secateur.pruning.depth import HalfBlocks, remove_blocks
from secateur.pruning.families import blocks_of, family_of, skeleton
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.modes import evaluation
from secateur.pruning.plan import Plan
from secateur.pruning.progress import tracked
from secateur.pruning.widths.gate_hooks import GateHooks

FLOAT32_PARAMETERS = 2_000_000_000  # two float32 copies of this size take 16 GB
DECODED_TOKENS = 8
# Allowed times `rounding_noise`. Masked and cut models in bfloat16 were off by 0.4 of it (8 blocks
# of width 256), by 0.07 to 0.23 (30 of 576) and, with gains and few tokens, by 1.1 (4 of 24); in
# float32, where sums are rounded, too, by 0.9 to 1.6 (30 of 576; logits by 7e-5 to 3e-4) and by 0.4
# to 1.1 (12 and 24 of 24).
NOISE, FLOAT32_NOISE = 2, 8


class ExportError(ValueError):
    """Raised if an exported model differs from the model that the plan describes."""


def verify_export(
    model: PreTrainedModel,
    plan: Plan,
    folder: str | Path,
    windows_BT: Int[Tensor, "B T"],
    tolerance: float = 1e-4,
) -> float:
    """Compare an exported folder with the masked dense model.

    Args:
        model: The dense base model, not quantised. Its gates, if any, must be open.
        plan: The plan that was exported.
        folder: The exported model.
        windows_BT: Token ids, at least 2 per window.
        tolerance: Largest difference of two logits in float32, above 0, or `FLOAT32_NOISE` times
            the `rounding_noise` of the model, if that is more. Models that are too large for
            float32 may differ by `NOISE` times their noise.

    Returns:
        The largest absolute difference of two logits.

    Raises:
        ExportError: The folder cannot be loaded, has another number of parameters than the plan
            promises, or computes something else; names the first differing block.
    """
    small = model.num_parameters() <= FLOAT32_PARAMETERS
    stored = BaseModel(Path(folder)).dtype_of()
    # Gains are rounded with the weights that they are folded into, but not as gates.
    rounded = small and plan.gains is not None and model.dtype == stored != torch.float32
    exact = small and (plan.gains is None or rounded)
    dense = _in_float32(model) if small else model
    if rounded:
        _fold_gains(dense, plan, stored)
    exported = _load(folder, dense, model.dtype)
    _check_parameters(model, plan, exported)
    windows_BT = windows_BT.to(dense.device)
    with _gated(dense, replace(plan, gains=None) if rounded else plan):
        return _largest_difference(
            dense,
            exported,
            windows_BT,
            "masked one",
            torch.float32 if exact else model.dtype,
            tolerance,
            plan.kept_blocks(),
        )


def verify_saved(
    model: PreTrainedModel,
    folder: str | Path,
    windows_BT: Int[Tensor, "B T"],
    tolerance: float = 1e-4,
) -> float:
    """Compare a saved folder with the live model that was saved.

    Args:
        model: The live model, not quantised.
        folder: The saved model.
        windows_BT: Token ids, at least 2 per window.
        tolerance: Largest difference of two logits, as for `verify_export`.

    Returns:
        The largest absolute difference of two logits.

    Raises:
        ExportError: The folder cannot be loaded, has another number of parameters, or computes
            something else; names the first differing block.
    """
    small = model.num_parameters() <= FLOAT32_PARAMETERS
    live = _in_float32(model) if small else model
    saved = _load(folder, live, model.dtype)
    if (found := saved.num_parameters()) != (wanted := model.num_parameters()):
        raise ExportError(f"The saved model has {found} parameters and the trained one {wanted}.")
    with evaluation(live):
        return _largest_difference(
            live, saved, windows_BT.to(live.device), "trained one", live.dtype, tolerance
        )


def verify_cut(
    model: PreTrainedModel,
    plan: Plan,
    narrow: PreTrainedModel,
    windows_BT: Int[Tensor, "B T"],
    tolerance: float = 1e-4,
) -> float:
    """Compare a model that was cut in memory with the masked model that it was cut from.

    Args:
        model: The dense model. Gates hooked into it already must be open.
        plan: The plan that it was cut by, without gains.
        narrow: Result of `cut`, in the type of the dense model.
        windows_BT: Token ids, at least 2 per window.
        tolerance: Largest difference of two logits, as for `verify_export`.

    Returns:
        The largest absolute difference of two logits.

    Raises:
        ExportError: The two compute different logits; names the first differing block.
    """
    small = model.num_parameters() <= FLOAT32_PARAMETERS
    dense, smaller = (_in_float32(own) if small else own for own in (model, narrow))
    with _gated(dense, plan), evaluation(smaller):
        return _largest_difference(
            dense,
            smaller,
            windows_BT.to(dense.device),
            "masked one",
            dense.dtype,
            tolerance,
            plan.kept_blocks(),
        )


@torch.no_grad()
def _largest_difference(
    dense: PreTrainedModel,
    exported: PreTrainedModel,
    windows_BT: Int[Tensor, "B T"],
    original: str,
    dtype: torch.dtype,
    tolerance: float,
    blocks: Sequence[int] | None = None,
) -> float:
    """Compare two models, see `compare_recorded`.

    Args:
        dense: The model that is right.
        exported: The model to test.
        windows_BT: Token ids.
        original: Name of the first one, for the message.
        dtype: The narrowest type that either rounds to.
        tolerance: Allowed difference of two logits if that is float32, and roundings move less.
        blocks: Blocks of the first model that the second one has; None stands for all.
    """
    said = record(dense, windows_BT)
    noise, exact = rounding_noise(dense, said[0], dtype), dtype == torch.float32
    return compare_recorded(
        said,
        exported,
        original,
        max(tolerance, FLOAT32_NOISE * noise) if exact else NOISE * noise,
        lambda share: _first_difference(dense, exported, windows_BT, share, blocks),
    )


@dataclass(frozen=True)
class Said:
    """Recorded logits of a model for some tokens.

    Args:
        where: Description of the tokens, for a message.
        tokens_Bt: Token ids.
        logits_BtV: Logits of the tokens that follow.
    """

    where: str
    tokens_Bt: Int[Tensor, "B t"]
    logits_BtV: Float[Tensor, "B t V"]


@torch.no_grad()
def record(model: PreTrainedModel, windows_BT: Int[Tensor, "B T"]) -> list[Said]:
    """Record the logits of complete windows, and of a cached greedy decode from half windows."""
    said = [Said("whole windows", windows_BT, model(windows_BT).logits)]
    # Read half a window into the cache at once.
    cache, tokens_Bt = DynamicCache(), windows_BT[:, : (windows_BT.shape[1] + 1) // 2]
    steps = min(DECODED_TOKENS, windows_BT.shape[1] // 2)
    for step in range(steps + 1):
        logits_BtV = model(tokens_Bt, past_key_values=cache, use_cache=True).logits
        said.append(Said(f"step {step} of a cached decode", tokens_Bt, logits_BtV))
        tokens_Bt = logits_BtV[:, -1:].argmax(-1)
    return said


@torch.no_grad()
def rounding_noise(model: PreTrainedModel, said: Said, dtype: torch.dtype) -> float:
    """Largest change of a logit if the residual stream is rounded once more behind every block.

    There every entry moves by one unit of rounding, up or down. No fixed number of units of the
    largest logit would do: masked and cut models of 8 and 30 blocks in bfloat16 differed by 0.8 to
    7.3 of these, because each model amplifies errors in its own way.

    Args:
        model: The model.
        said: Its logits for complete windows.
        dtype: The type that is rounded to.

    Returns:
        The largest change, in the units of logits, 0 or more.
    """
    draw, unit = torch.Generator().manual_seed(0), torch.finfo(dtype).eps

    def round_again(block: object, inputs: object, stream_BTD: Tensor) -> Tensor:
        sign_BTD = torch.randint(0, 2, stream_BTD.shape, generator=draw) * 2 - 1
        moved_BTD = stream_BTD.float() * (1 + unit * sign_BTD.to(stream_BTD.device))
        return moved_BTD.to(stream_BTD.dtype)

    blocks = blocks_of(model, family_of(model.config))
    handles = [block.register_forward_hook(round_again) for block in blocks]
    try:
        moved_BtV = model(said.tokens_Bt).logits
    finally:
        for handle in handles:
            handle.remove()
    return float((moved_BtV.float() - said.logits_BtV.float()).abs().max())


@torch.no_grad()
def compare_recorded(
    said: Sequence[Said],
    exported: PreTrainedModel,
    original: str,
    limit: float,
    first_difference: Callable[[float], str],
) -> float:
    """The largest absolute difference between the logits of a model and recorded logits.

    Args:
        said: Result of `record` for the other model; this one gets the same tokens.
        exported: The model.
        original: Name of the other one, for the message.
        limit: Allowed difference of two logits, above 0.
        first_difference: Function that describes where the models first differ by more than a
            fraction of the largest entry.

    Raises:
        ExportError: It is beyond what is allowed.
    """
    largest, cache = 0.0, DynamicCache()
    for place, ours in enumerate(tracked(said, "Proving the export")):
        cached = {"past_key_values": cache, "use_cache": True} if place else {}
        theirs_BtV = exported(ours.tokens_Bt, **cached).logits
        scale = max(1.0, float(ours.logits_BtV.abs().max()))
        difference = float((ours.logits_BtV.float() - theirs_BtV.float()).abs().max())
        if not difference <= limit:  # so that a NaN fails
            raise ExportError(
                f"The exported model differs from the {original} in {ours.where}: a logit is off "
                f"by {difference:.3g}, allowed is {limit:.3g}. {first_difference(limit / scale)}"
            )
        largest = max(largest, difference)
    return largest


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in float32, constants that are not parameters included."""
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return model
    copy: PreTrainedModel = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    if gone := set(HalfBlocks().of(copy)) - set(HalfBlocks().of(model)):
        remove_blocks(copy, gone)
    copy.load_state_dict(model.state_dict())
    copy.to(model.device)  # type: ignore[arg-type]
    return copy


@torch.no_grad()
def _fold_gains(copy: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> None:
    """Multiply the gains of a plan into the weights of a float32 copy, rounded as in the files."""
    for number, block in enumerate(blocks_of(copy, plan.family)):
        for name, parameter in block.named_parameters():
            axes = plan.family.gain_axes(name)
            for axis, key in enumerate(axes):
                gain_F = (plan.gains or {}).get(f"{number}.{key}")
                if gain_F is not None:
                    shape = [-1 if a == axis else 1 for a in range(parameter.dim())]
                    parameter.mul_(gain_F.to(parameter.device).view(shape))
            if axes:
                parameter.copy_(parameter.to(dtype))


def _load(folder: str | Path, other: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Load an export in a type; on the device of another model and, if that is, in float32."""
    try:
        exported = BaseModel(Path(folder)).load(dtype, other.device)
    except ValueError as error:
        raise ExportError(f"{folder} cannot be loaded: {error}") from error
    exported = _in_float32(exported) if other.dtype == torch.float32 else exported
    exported.eval()
    return exported


def _check_parameters(model: PreTrainedModel, plan: Plan, exported: PreTrainedModel) -> None:
    table = Parameters(whole_model=True).table(skeleton(model.config), plan.family)
    promised = int(table(torch.tensor(plan.widths, dtype=torch.float64)))
    if (found := exported.num_parameters()) != promised:
        raise ExportError(
            f"The exported model has {found} parameters, expected by the plan are {promised}."
        )


@contextmanager
def _gated(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Apply the gates of the plan to the dense model, in evaluation mode; restore it afterwards."""
    hooks = GateHooks(model, plan.family)
    try:
        with evaluation(model), hooks.applied(plan.gates(), plan.gains):
            yield
    finally:
        hooks.remove()


def _first_difference(
    dense: PreTrainedModel,
    exported: PreTrainedModel,
    windows_BT: Int[Tensor, "B T"],
    limit: float,
    blocks: Sequence[int] | None,
) -> str:
    """A sentence that names the first block whose output differs on complete windows.

    Args:
        dense: The dense model, masked.
        exported: The exported model.
        windows_BT: Token ids.
        limit: Largest difference, as a fraction of the largest entry of the residual stream.
        blocks: Blocks of the dense model that the exported one has; None stands for all.
    """
    ours = dense(windows_BT, output_hidden_states=True).hidden_states
    theirs = exported(windows_BT, output_hidden_states=True).hidden_states
    blocks = range(len(ours) - 1) if blocks is None else blocks
    # The embeddings, the output of each block, and, last, the output of the final norm.
    places = [0, *(block + 1 for block in blocks)]
    for place, theirs_BTD in zip(places, theirs, strict=True):
        ours_BTD = ours[-1] if place == places[-1] else ours[place]
        difference_BTD = (ours_BTD.float() - theirs_BTD.float()).abs()
        if not float(difference_BTD.max()) <= limit * float(ours_BTD.float().abs().max()):
            where = f"The first difference is in block {place - 1}."
            return where if place else "The embeddings differ."
    return "No block differs by as much on complete windows, so the head or the cache differs."
