"""Score a block by the angle between its input and output.

Sources: ShortGPT (arXiv 2403.03853), block influence; Gromov et al. (arXiv 2403.17887), angular
distance of runs of consecutive blocks.

    influence_n = 1 - mean over tokens of cos(x_n, x_{n+1})
    distance_{l, n} = mean over windows of arccos(cos(x_l, x_{l+n})) / pi, at the last token

x_n is the input of block n, and x_L the output of the last block, before the final norm. Both cost
one forward pass. Cosines are computed in float64 and clamped: in float16 they leave [-1, 1].

Legend: L = blocks, U = units, N = windows, B = windows of a batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.pruning.depth.scores import BlockScores, TextScore
from secateur.pruning.depth.units import Unit, first_input
from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.modes import evaluation


@dataclass(frozen=True)
class BlockInfluence(TextScore):
    """1 minus the cosine between input and output of a block, mean over tokens.

    Needs one forward pass and stores nothing: suited to the largest models.

    Args:
        batch_size: Windows that the model sees at once, 1 or more; does not change the result.

    Raises:
        ValueError: A setting is outside its range.
    """

    def _score(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"], units: tuple[Unit, ...]
    ) -> BlockScores:
        self._refuse_halves(units)
        influence: dict[int, list[Tensor]] = {unit.block: [] for unit in units}

        def see(block: int, before_BTD: Tensor, after_BTD: Tensor) -> None:
            if block in influence:
                influence[block].append(1 - cosine(before_BTD, after_BTD).mean(1).cpu())

        watch(model, self.batches(model, windows_NT), see)
        influence_UN = torch.stack([torch.cat(parts_B) for parts_B in influence.values()])
        return BlockScores(influence_UN.mean(1), standard_errors(influence_UN), units)


@dataclass(frozen=True)
class AngularDistance(TextScore):
    """Angle between input and output of a run of blocks, at the last token, over pi.

    One-shot search removes the run of consecutive blocks with the smallest distance; all lengths
    are scored in the same pass. Intended for use before retraining.

    Args:
        batch_size: Windows that the model sees at once, 1 or more; does not change the result.

    Raises:
        ValueError: A setting is outside its range.
    """

    def _score(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"], units: tuple[Unit, ...]
    ) -> BlockScores:
        self._refuse_halves(units)
        num_blocks = model.config.num_hidden_layers
        last: list[list[Tensor]] = [[] for _ in range(num_blocks + 1)]

        def see(block: int, before_BTD: Tensor, after_BTD: Tensor) -> None:
            last[block].append(before_BTD[:, -1].double().cpu())
            if block == num_blocks - 1:
                last[num_blocks].append(after_BTD[:, -1].double().cpu())

        watch(model, self.batches(model, windows_NT), see)
        states = [torch.cat(parts_BD) for parts_BD in last]
        runs_LL = torch.full((num_blocks, num_blocks), math.nan, dtype=torch.float64)
        for start in range(num_blocks):
            for end in range(start + 1, num_blocks + 1):
                distance_N = cosine(states[start], states[end]).acos() / math.pi
                runs_LL[start, end - start - 1] = distance_N.mean()
        ones_UN = torch.stack(
            [cosine(states[u.block], states[u.block + 1]).acos() / math.pi for u in units]
        )
        return BlockScores(ones_UN.mean(1), standard_errors(ones_UN), units, runs_LL)


def cosine(a: Float[Tensor, "*N D"], b: Float[Tensor, "*N D"]) -> Float[Tensor, "*N"]:
    """Cosine of the angle between vectors along the last axis, float64, in [-1, 1]."""
    return torch.cosine_similarity(a.double(), b.double(), dim=-1).clamp(-1, 1)


def standard_errors(samples_UN: Float[Tensor, "U N"]) -> Float[Tensor, " U"] | None:
    """Standard errors of the means over the last axis; None for a single sample."""
    count = samples_UN.shape[1]
    return samples_UN.std(1) / math.sqrt(count) if count > 1 else None


@torch.inference_mode()
def watch(
    model: PreTrainedModel,
    batches: Iterable[Int[Tensor, "_ T"]],
    see: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Run a model on windows and pass input and output of every block to a function.

    Args:
        model: A causal language model.
        batches: Token ids, on its device.
        see: Called with the index of a block, its input and its output (B, T, D), per batch.
    """
    with evaluation(model), _watched(blocks_of(model, family_of(model.config)), see):
        for input_BT in batches:
            model.base_model(input_ids=input_BT, use_cache=False)


@contextmanager
def _watched(
    blocks: Sequence[nn.Module], see: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    def watcher(index: int) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            see(index, first_input(args, kwargs), output)

        return hook

    handles = [
        block.register_forward_hook(watcher(index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
