"""Score a block by the first-order change of the loss: Shortened LLaMA (arXiv 2402.02834), eq. 3.

    score_n = sum over the weights w of block n of |w * dL/dw|

L is the mean negative log-likelihood of a prediction over all calibration text: gradients of all
batches are summed before the absolute value, so the batch size does not change the result. Norms
are included, biases are not.

Differs from the paper: the backward pass runs block by block, from the last to the first, over all
batches; each block is run again from its input, stored in a forward pass. Only the gradients of one
block are in memory at once, and they are exact. Plain backpropagation, as in the released code,
stores the gradients of the whole model, and that code also a copy of weights and gradients.
Cost: two forward passes and one backward pass. `peak_bytes` counts the memory.

Legend: L = blocks, N = windows, B = windows of a batch, T = tokens of a window, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from secateur.pruning.depth.calls import Call, recorded, with_input
from secateur.pruning.depth.scores import BlockScores, TextScore, weights
from secateur.pruning.depth.units import Unit, first_input
from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.measure.perplexity import window_nll
from secateur.pruning.modes import frozen
from secateur.pruning.progress import tracked


@dataclass(frozen=True)
class Taylor(TextScore):
    """Sum of |weight x gradient| over the block: the first-order change of the loss.

    Preserves downstream tasks better than perplexity does, with `protect_first` 4 and
    `protect_last` 2 ("Taylor+"): without them it may select the first block.

    Args:
        batch_size: Windows per forward pass of a block, 1 or more; does not change the result.

    Raises:
        ValueError: A setting is outside its range.
    """

    def _score(
        self, model: PreTrainedModel, windows_NT: Int[Tensor, "N T"], units: tuple[Unit, ...]
    ) -> BlockScores:
        tensors = {unit: weights(model, unit) for unit in units}
        blocks = blocks_of(model, family_of(model.config))
        lowest = min(unit.block for unit in units)
        score: dict[Unit, float] = {}
        with frozen(model), torch.enable_grad():
            calls, gradients = [], []
            for input_BT in self.batches(model, windows_NT):
                call, gradient_BTD = _to_the_last_block(model, input_BT, len(windows_NT))
                calls.append({block: call[block] for block in call if block >= lowest})
                gradients.append(gradient_BTD)
            for index in tracked(range(len(blocks) - 1, lowest - 1, -1), "Gradients of blocks"):
                own = [unit for unit in units if unit.block == index]
                changes = _through_block(
                    blocks[index],
                    [call.pop(index) for call in calls],
                    gradients,
                    [tensor for unit in own for tensor in tensors[unit]],
                )
                for unit in own:
                    score[unit] = sum(changes[id(tensor)] for tensor in tensors[unit])
        return BlockScores(torch.tensor([score[unit] for unit in units]).double(), None, units)


def _to_the_last_block(
    model: PreTrainedModel, input_BT: Int[Tensor, "B T"], num_windows: int
) -> tuple[dict[int, Call], Float[Tensor, "B T D"]]:
    """The call of every block, and the gradient of the loss to the output of the last one."""
    outputs: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    handle = blocks_of(model, family_of(model.config))[-1].register_forward_hook(cut)
    try:
        with recorded(model) as calls:
            loss = window_nll(model, input_BT).sum() / num_windows
    finally:
        handle.remove()
    (gradient_BTD,) = torch.autograd.grad(loss, outputs)
    return calls, gradient_BTD


def _through_block(
    block: nn.Module,
    calls: Sequence[Call],
    gradients: list[Tensor],
    tensors: Sequence[nn.Parameter],
) -> dict[int, float]:
    """Sum of |weight x gradient| of tensors of a block, by their id.

    Args:
        block: The block.
        calls: Its call, per batch.
        gradients: Gradient of the loss to its output, per batch; replaced by that to its input.
        tensors: Parameters of the block.
    """
    summed: dict[Tensor, Tensor] = {  # over batches, before the absolute value
        tensor: torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors
    }

    def collect(tensor: Tensor) -> None:
        assert tensor.grad is not None
        summed[tensor] += tensor.grad
        tensor.grad = None  # one gradient at a time

    handles = [
        tensor.requires_grad_().register_post_accumulate_grad_hook(collect) for tensor in tensors
    ]
    try:
        for batch, call in enumerate(calls):
            before_BTD = first_input(*call).detach().requires_grad_()
            args, kwargs = with_input(call, before_BTD)
            block(*args, **kwargs).backward(gradients[batch])
            assert before_BTD.grad is not None
            gradients[batch] = before_BTD.grad
    finally:
        for handle, tensor in zip(handles, tensors, strict=True):
            handle.remove()
            tensor.requires_grad_(False)
    return {
        id(tensor): float(total.mul_(tensor.detach()).abs_().sum(dtype=torch.float64))
        for tensor, total in summed.items()
    }


@dataclass(frozen=True)
class PeakBytes:
    """Peak memory of `Taylor`, in bytes.

    Args:
        weights: The model, tied tensors once.
        gradients: Summed gradients (float32) of the largest block, and one gradient of a tensor.
        states: Hidden states before every block, all windows, and the gradient to one of them.
        activations: Tensors that one block keeps for its backward pass, one batch.
    """

    weights: int
    gradients: int
    states: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.states + self.activations


def peak_bytes(
    config: PreTrainedConfig,
    num_windows: int,
    window_tokens: int,
    batch_size: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> PeakBytes:
    """Memory of `Taylor` on a model, from shapes alone: nothing is allocated.

    The loss of the first pass is computed before any gradient; with a vocabulary V it takes about
    10 x batch_size x window_tokens x V bytes beside the weights and states, which can be more than
    gradients and activations of a small model.

    Args:
        config: Configuration of the model.
        num_windows: Windows of calibration text, 1 or more.
        window_tokens: Tokens of a window, 2 or more.
        batch_size: Windows per forward pass of a block, 1 or more.
        dtype: Type of the weights.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():  # shapes without memory, on a device that selects fused attention
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        blocks = blocks_of(model, family_of(config))
        batch = min(batch_size, num_windows)
        with frozen(model), recorded(model) as calls:
            input_BT = torch.zeros(batch, window_tokens, dtype=torch.long)
            model.base_model(input_ids=input_BT, use_cache=False)
        before_BTD = first_input(*calls[0]).detach().requires_grad_()
        args, kwargs = with_input(calls[0], before_BTD)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            blocks[0].eval()(*args, **kwargs)
    size, width = dtype.itemsize, config.hidden_size
    tensors = [[w for n, w in b.named_parameters() if n.endswith(".weight")] for b in blocks]
    own = {id(weight.untyped_storage()) for weight in blocks[0].parameters()}
    stream = num_windows * window_tokens * width * size
    return PeakBytes(
        weights=sum(tensor.numel() * size for tensor in model.parameters()),
        gradients=max(sum(4 * w.numel() for w in ws) for ws in tensors)
        + max(size * w.numel() for ws in tensors for w in ws),
        states=stream * (len(blocks) + 1),
        activations=sum(n for storage, n in saved.items() if storage not in own),
    )
