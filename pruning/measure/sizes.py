"""Sizes of a model: parameters, operations, bytes and zeros, counted on its loaded modules.

Nothing here knows of cost tables or plans, so that it checks what `secateur.pruning.costs` has
promised.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.pruning.files.headers import weight_files


@dataclass(frozen=True)
class Counts:
    """What a loaded model holds and computes.

    Args:
        parameters: All parameters, tied ones once.
        block_projection_parameters: Weights and biases of the linear layers inside the blocks.
        block_flops_per_token: Forward operations in those layers: 2 per weight, 1 per bias.
        head_flops_per_token: Forward operations in the output head.
        query_width: Query features, summed over all attention layers.
    """

    parameters: int
    block_projection_parameters: int
    block_flops_per_token: int
    head_flops_per_token: int
    query_width: int

    def flops_per_token(self, context_tokens: int) -> int:
        """Forward operations per token: blocks, head, and 4 per query feature and token attended.

        Args:
            context_tokens: Tokens that a query attends to, 0 or more.
        """
        scores = 4 * context_tokens * self.query_width
        return self.block_flops_per_token + self.head_flops_per_token + scores


def count(model: Any) -> Counts:
    """Count a loaded model by walking its modules.

    Args:
        model: A transformers causal language model, on any device, meta included.

    Raises:
        ValueError: It has no blocks with linear layers, or its weights are quantised: packed
            numbers do not show how many weights there are.
    """
    inside = _inside(model)
    linears = _linears(model)
    if any(not linear.weight.is_floating_point() for linear in linears):
        raise ValueError("Quantised weights cannot be counted; load the model in its own dtype.")
    weights = sum(linear.weight.numel() for linear in linears)
    biases = sum(linear.bias.numel() for linear in linears if linear.bias is not None)
    config = model.config
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    # Transformers marks an attention layer by its place in the cache and the size of its heads.
    attentions: list[Any] = [
        m for m in inside if hasattr(m, "layer_idx") and hasattr(m, "head_dim")
    ]
    full = config.num_attention_heads * head_size
    return Counts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        block_projection_parameters=weights + biases,
        block_flops_per_token=2 * weights + biases,
        head_flops_per_token=2 * model.get_output_embeddings().weight.numel(),
        # Blocks of narrow models may differ in heads; other models may have fused projections.
        query_width=sum(
            int(attention.q_proj.out_features) if hasattr(attention, "q_proj") else full
            for attention in attentions
        ),
    )


def file_bytes(folder: str | Path) -> int:
    """Bytes of the weights in a model folder.

    Raises:
        ValueError: It holds no safetensors weights.
    """
    return sum(file.stat().st_size for file in weight_files(Path(folder)))


def memory_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a loaded model, shared storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def zero_fraction(model: nn.Module) -> float:
    """Fraction of the weights of the linear layers in the blocks that are exactly zero, in [0, 1].

    Raises:
        ValueError: It has no blocks with linear layers.
    """
    weights = [linear.weight for linear in _linears(model)]
    nonzero = sum(int(weight.count_nonzero()) for weight in weights)
    return 1 - nonzero / sum(weight.numel() for weight in weights)


def _inside(model: nn.Module) -> list[nn.Module]:
    """All modules inside the blocks, once each."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    found = (module for blocks in lists for block in blocks for module in block.modules())
    return list({id(module): module for module in found}.values())


def _linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers inside the blocks.

    Raises:
        ValueError: There are none.
    """
    linears = [module for module in _inside(model) if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError("The model has no list of blocks with nn.Linear layers to count.")
    return linears
