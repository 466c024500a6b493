"""LoRAPrune: score gates by the gradient of weights that low-rank updates tell.

Source: "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning" (arXiv
2305.18403, ACL 2024 Findings, section 3.2). The gradient of a frozen weight W is not computed. What
the update B A would change in one step of size 1 stands for it:

    G = dB A + B dA - dB dA,
    importance of a weight = |G (W + gamma B A)|,   gamma = alpha / rank.

The importance of an entry in a projection is the sum over its row or column, divided by the norm of
all such sums of the projection, and the sum over the projections of its site.

Differs from the paper: the absolute value of the released code instead of the square; see also
`TrainingScore`. Entries are compared within their site, since values divided by a norm say nothing
between blocks.

What the estimate is worth: at B = 0 it is a projection of the exact gradient on `rank` random
directions. Along rows (gate, up) it ranks as the exact |G W|, with a rank correlation of 0.85 on a
LLaMA of 7 M parameters at rank 8; along the columns of down with 0.21. `GateTaylor` is exact to
first order, reads less and costs no more: prefer it.

Worked by hand: W = (1, -1), A = (1, 2), B = 0, dB = 3 and dA = 0 give G = (3, 6), and importances
3 and 6: (9) along the row, (3, 6) along the columns.

Legend: N = all gates, S = sites, O, J = output and input features of a projection, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.families import Family, blocks_of
from secateur.pruning.lora import ADAPTER
from secateur.pruning.sites import Site
from secateur.pruning.widths.training_score import TrainingScore, Watch

_CHUNK_BYTES = 64 * 2**20


def importances(
    weight_OJ: Float[Tensor, "O J"],
    a_RJ: Float[Tensor, "R J"],
    b_OR: Float[Tensor, "O R"],
    grad_a_RJ: Float[Tensor, "R J"],
    grad_b_OR: Float[Tensor, "O R"],
    gamma: float,
) -> tuple[Float[Tensor, " O"], Float[Tensor, " J"]]:
    """Sums of the importance of weights along rows and columns; 64 MiB of them at a time.

    Args:
        weight_OJ: The frozen weight.
        a_RJ: A of the update.
        b_OR: B of the update.
        grad_a_RJ: Gradient of A.
        grad_b_OR: Gradient of B.
        gamma: Factor of the update.
    """
    rows_O = torch.zeros(len(weight_OJ), device=weight_OJ.device)
    columns_J = torch.zeros(weight_OJ.shape[1], device=weight_OJ.device)
    rows_at_once = max(1, _CHUNK_BYTES // (4 * weight_OJ.shape[1]))
    for start in range(0, len(weight_OJ), rows_at_once):
        at = slice(start, start + rows_at_once)
        gradient_OJ = grad_b_OR[at] @ (a_RJ - grad_a_RJ) + b_OR[at] @ grad_a_RJ
        updated_OJ = weight_OJ[at].float() + gamma * b_OR[at] @ a_RJ
        importance_OJ = (gradient_OJ * updated_OJ).abs()
        rows_O[at] = importance_OJ.sum(1)
        columns_J += importance_OJ.sum(0)
    return rows_O, columns_J


@dataclass(frozen=True)
class LoRATaylor(TrainingScore):
    """LoRAPrune's importance from low-rank updates; needs updates of all projections of a site.

    Args:
        average: Weight of the earlier steps in the moving average, in [0, 1).
    """

    def watch(
        self, model: PreTrainedModel, family: Family, prunes: Callable[[Site], bool]
    ) -> Watch:
        return _LoRAWatch(model, family, prunes)


class _LoRAWatch(Watch):
    """The updates of the projections of every site, by the axis that the site cuts."""

    def __init__(
        self, model: PreTrainedModel, family: Family, prunes: Callable[[Site], bool]
    ) -> None:
        super().__init__(model, family, prunes)
        blocks = blocks_of(model, family)
        self.layers: list[list[tuple[Any, int]]] = []
        for site, pruned in zip(self.hooks.sites, self.pruned, strict=True):
            found = []
            for projection in family.projections_of(blocks[site.block]) if pruned else ():
                layer = blocks[site.block].get_submodule(projection.path)
                axes = (projection.output, projection.input)
                for axis in (axis for axis, name in enumerate(axes) if name == site.name):
                    if not hasattr(layer, "lora_A"):
                        self.remove()
                        raise ValueError(
                            f"`score` LoRATaylor of site {site.key} needs a low-rank update of "
                            f"{projection.path}, which `model.lora` has none of: add it to "
                            "`model.lora.targets`, or take `score` GateTaylor."
                        )
                    found.append((layer, axis))
            self.layers.append(found)

    def before_batch(self, windows: int) -> None:
        """Do nothing: the gradients of the updates are read once per step."""

    def after_backward(self) -> None:
        """Do nothing."""

    @torch.no_grad()
    def values(self) -> Float[Tensor, " N"]:
        sums = {id(layer): _sums(layer) for found in self.layers for layer, _ in found}
        values = []
        for site, found in zip(self.hooks.sites, self.layers, strict=True):
            total_I = torch.zeros(site.size, device=self.device)
            for layer, axis in found:
                # A site of heads has several rows per entry.
                value_I = sums[id(layer)][axis].view(site.size, -1).sum(1)
                total_I += value_I / (value_I.norm() + 1e-8)
            values.append(total_I)
        return torch.cat(values).cpu()


def _sums(layer: Any) -> tuple[Tensor, Tensor]:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    weight_OJ = layer.get_base_layer().weight.detach()
    return importances(weight_OJ, a, b, _gradient(a), _gradient(b), layer.scaling[ADAPTER])


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient; zeros where a batch gave none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
