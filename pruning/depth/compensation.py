"""Scale the residual stream before a removed block to make up for its effect on the norm:
Prune&Comp (arXiv 2507.18212), training-free.

    alpha_n = mean over channels c of (mean_t |x_{n+1}[t, c]| / mean_t |x_n[t, c]|)

A block makes the residual stream larger; without it the stream is too small compared with the
outputs of later blocks. So the embeddings and the outputs of earlier blocks are multiplied by
alpha_n. Their norms remove the scale of their inputs (up to the norm's epsilon), so their outputs
are otherwise unchanged. The result has the same shape.

Differs from the paper: all factors come from one pass of the dense model; and since the method can
do harm, it is kept only if it lowers the perplexity of the calibration text. Expected, on Llama-2
7B without 7 of 32 blocks, mean perplexity 33.9 -> 22.2 with block influence (published).

Legend: N = windows, T = tokens of a window, B = windows of a batch, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.pruning.depth.removal import bypassed, checked_blocks, remove_blocks
from secateur.pruning.depth.similarity import watch
from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.measure.perplexity import perplexity

_TINY = 1e-12  # avoids division by zero for channels that are always zero


@dataclass(frozen=True)
class Compensation:
    """The result of an attempt to compensate.

    Args:
        factors: Removed block to its factor, above 0.
        without: Perplexity of the calibration text without the blocks, not compensated.
        compensated: The same with compensation.
    """

    factors: Mapping[int, float]
    without: float
    compensated: float

    @property
    def kept(self) -> bool:
        """Whether it helped and was applied to the weights."""
        return self.compensated < self.without

    @property
    def provenance(self) -> dict[str, Any]:
        """Facts to record with the blocks: the factors applied to the weights, JSON values."""
        return {"compensation": {str(b): f for b, f in self.factors.items()}} if self.kept else {}


def remove_compensated(
    model: PreTrainedModel,
    blocks: Iterable[int],
    windows_NT: Int[Tensor, "N T"],
    provenance: Mapping[str, Any] | None = None,
    batch_size: int = 8,
) -> Compensation:
    """Remove blocks from a model permanently, in place, and compensate if that helps.

    Tied embeddings are untied, as the output head is not scaled; which adds one such matrix to the
    model.

    Args:
        model: A causal language model of a known family, not quantised, before the removal.
        blocks: Indices of the blocks to remove, in any order.
        windows_NT: Token ids of calibration text.
        provenance: Facts to record with the blocks; JSON values. The factors are recorded too.
        batch_size: Windows per forward pass, 1 or more.

    Raises:
        ValueError: As for `remove_blocks`, or the family normalises the outputs of blocks (Gemma),
            so that scaled weights would have no effect.
    """
    family = family_of(model.config)
    if sandwich := [norm.path for norm in family.norms if norm.output in ("attn_out", "mlp_out")]:
        raise ValueError(
            f"{family.model_type!r} models cannot be compensated: {sandwich[0]!r} normalises the "
            "output of a block, so that scaling its weights has no effect. Remove blocks without "
            "compensation."
        )
    gone = sorted(checked_blocks(blocks, model.config.num_hidden_layers))
    factors = stream_factors(model, gone, windows_NT, batch_size)
    with bypassed(model, gone):
        without = perplexity(model, windows_NT, batch_size).value
        with ExitStack() as stack:
            for block in gone:
                place = blocks_of(model, family)[block]
                stack.callback(place.register_forward_hook(_scaling(factors[block])).remove)
            compensated = perplexity(model, windows_NT, batch_size).value
    result = Compensation(factors, without, compensated)
    num_blocks = model.config.num_hidden_layers
    remove_blocks(model, gone, dict(provenance or {}) | result.provenance)
    if result.kept:
        staying = [block for block in range(num_blocks) if block not in gone]
        fold_factors(model, staying, factors)
    return result


def stream_factors(
    model: PreTrainedModel,
    blocks: Sequence[int],
    windows_NT: Int[Tensor, "N T"],
    batch_size: int = 8,
) -> dict[int, float]:
    """The factor by which each block enlarges the residual stream, from one forward pass.

    Args:
        model: The dense model.
        blocks: Indices of blocks.
        windows_NT: Token ids of calibration text.
        batch_size: Windows that the model sees at once, 1 or more.
    """
    sums: dict[int, list[Tensor]] = {block: [] for block in blocks}

    def see(block: int, before_BTD: Tensor, after_BTD: Tensor) -> None:
        if block in sums:
            both = torch.stack([x.abs().double().sum((0, 1)) for x in (before_BTD, after_BTD)])
            sums[block].append(both.cpu())

    watch(model, windows_NT.to(model.device).split(batch_size), see)
    totals = {block: torch.stack(parts).sum(0) for block, parts in sums.items()}
    return {
        block: float((after_D / before_D.clamp(min=_TINY)).mean())
        for block, (before_D, after_D) in totals.items()
    }


@torch.no_grad()
def fold_factors(
    model: PreTrainedModel, staying: Sequence[int], factors: Mapping[int, float]
) -> None:
    """Multiply weights of the shortened model by the factors of removed blocks.

    Args:
        model: The model without the removed blocks.
        staying: Former indices of its blocks.
        factors: Former index of each removed block to its factor.
    """
    family = family_of(model.config)
    untie(model)
    owner = model.get_submodule(family.blocks.rpartition(".")[0])
    for child in owner.children():
        if isinstance(child, nn.Embedding):  # tokens, and learned positions
            child.weight.mul_(prod(factors.values()))
    for origin, block in zip(staying, blocks_of(model, family), strict=True):
        later = prod(factor for removed, factor in factors.items() if removed > origin)
        for projection in family.projections_of(block):
            if projection.output in ("attn_out", "mlp_out"):
                for parameter in block.get_submodule(projection.path).parameters():
                    parameter.mul_(later)


def untie(model: PreTrainedModel) -> None:
    """Give the output head separate weights, and set the configuration accordingly."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head.weight is embeddings.weight:
        copy = head.weight.detach().clone()
        head.weight = nn.Parameter(copy, requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False


def _scaling(factor: float) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * factor

    return hook
