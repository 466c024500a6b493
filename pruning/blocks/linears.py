"""The linear layers of a block, and the call of a block.

Legend: B = windows of a batch, T = tokens of a window, D = width of the residual stream, O = output
features, I = input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from secateur.pruning.families import blocks_of, family_of


@dataclass(frozen=True)
class PrunableLinear:
    """A linear layer of a block, described by the configuration alone.

    Args:
        block: Number of its block.
        path: Module, relative to the block.
        shape: Output features, input features.
        in_mlp: Whether it belongs to the MLP; otherwise to attention.
        middle: The layer that reads the gated product of which its output is a factor; None if its
            output is not such a factor.
        plain_mlp: Whether it belongs to an MLP without a gate.
    """

    block: int
    path: str
    shape: tuple[int, int]
    in_mlp: bool
    middle: str | None
    plain_mlp: bool

    @property
    def name(self) -> str:
        """Block and module, such as `3.mlp.up_proj`."""
        return f"{self.block}.{self.path}"


def linears_of(model: PreTrainedModel) -> list[list[PrunableLinear]]:
    """The prunable linear layers of a model, live or on the meta device, block by block.

    Raises:
        ValueError: The family is unknown, or the weights are quantised.
    """
    family = family_of(model.config)
    readers = {p.input: p.path for p in family.projections if p.input == "mlp_mid"}
    factors = [p.path for p in family.projections if p.output == "mlp_mid"]
    gated = factors if len(factors) == 2 else []
    linears = []
    for number, block in enumerate(blocks_of(model, family)):
        own = []
        for projection in family.projections_of(block):
            weight = weight_of(block, projection.path)
            if not weight.is_floating_point() or weight.dim() != 2:
                raise ValueError(
                    f"Block {number} has a quantised weight in {projection.path}: single weights "
                    "cannot be set to zero. Prune the original checkpoint, then quantise."
                )
            sites = (projection.input or "", projection.output or "")
            in_mlp = any(site.startswith("mlp") for site in sites)
            own.append(
                PrunableLinear(
                    block=number,
                    path=projection.path,
                    shape=(weight.shape[0], weight.shape[1]),
                    in_mlp=in_mlp,
                    middle=readers["mlp_mid"] if projection.path in gated else None,
                    plain_mlp=in_mlp and not gated,
                )
            )
        linears.append(own)
    return linears


def weight_of(block: nn.Module, path: str) -> Tensor:
    """The weight (O, I) of a linear layer of a block."""
    weight = block.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight


@dataclass
class BlockCall:
    """The arguments of a block for one batch of windows.

    Args:
        hidden_BTD: Its input.
        args: Further positional arguments of the real call.
        kwargs: Keyword arguments of the real call.
    """

    hidden_BTD: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Output (B, T, D) of a block.

        Args:
            block: The block.
            weights: Parameter name, relative to the block, to the value to use instead.
        """
        inputs = (self.hidden_BTD, *self.args)
        output = functional_call(block, weights or {}, inputs, self.kwargs)
        output_BTD: Tensor = output[0] if isinstance(output, tuple) else output
        return output_BTD
