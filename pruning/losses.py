"""Token losses from hidden states, in chunks, so that never all logits of a batch are in memory.

The gradient of every chunk is computed during the forward pass, while its logits exist: nothing is
computed twice and at most `chunk_tokens` x vocabulary logits are in memory. Only for a trained head
that is sharded, the logits of a chunk are computed twice.

Legend: N = tokens of a batch, C = tokens of a chunk, D = model width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""A function from hidden states (..., D) to logits (..., V)."""


def head_of(model: nn.Module) -> Head:
    """The output head of a causal language model, with soft-capping if configured."""
    linear: Any = model.get_output_embeddings()  # type: ignore[operator]
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is None:
        return lambda hidden: linear(hidden)
    return lambda hidden: cap * torch.tanh(linear(hidden) / cap)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of a token loss.

    Args:
        cross_entropy: Weight of the negative log-likelihood of the next token, 0 or more.
        distillation: Weight of the KL divergence from the dense model, 0 or more; costs one more
            forward pass per step if not 0.

    Raises:
        ValueError: A weight is negative, or both are 0.
    """

    cross_entropy: float = 1.0
    distillation: float = 0.0

    def __post_init__(self) -> None:
        if min(self.cross_entropy, self.distillation) < 0 or not (
            self.cross_entropy or self.distillation
        ):
            raise ValueError(
                "`cross_entropy` and `distillation` must be 0 or more and not both 0, "
                f"got {self.cross_entropy} and {self.distillation}."
            )


@dataclass(frozen=True)
class TokenLosses:
    """Mean losses per token, in nats.

    Args:
        total: The weighted sum, which is minimised.
        cross_entropy: Mean negative log-likelihood of the next token.
        distillation: Mean KL divergence from the teacher's to the student's distribution; 0 without
            a teacher.
    """

    total: Tensor
    cross_entropy: Tensor
    distillation: Tensor


def token_losses(
    hidden_ND: Tensor,
    labels_N: Tensor,
    head: Head,
    *,
    teacher_ND: Tensor | None = None,
    teacher_head: Head | None = None,
    weights: LossWeights | None = None,
    chunk_tokens: int = 1024,
    parameters: Sequence[Tensor] | None = (),
) -> TokenLosses:
    """Cross-entropy and distillation over the tokens of a batch.

    Args:
        hidden_ND: Last hidden states, shape (N, D), each predicting the label of its row. Without
            rows, all losses and gradients are 0.
        labels_N: Token ids (int64), shape (N,).
        head: Output head.
        teacher_ND: Hidden states of the teacher; needed if the weight of distillation is not 0.
        teacher_head: Output head of the teacher; None if it is the same.
        weights: Weights of cross-entropy and distillation; None means cross-entropy alone.
        chunk_tokens: Tokens whose logits are in memory at once, 1 or more.
        parameters: Trained parameters of the head; None for a trained head that is sharded, so that
            only the head itself can gather them: then the logits are computed again in the backward
            pass.
    """
    weights = weights or LossWeights()
    assert teacher_ND is not None or not weights.distillation

    def weighted(piece_CD: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target_CV = None if teacher_ND is None else (teacher_head or head)(teacher_ND[at])
        found: tuple[Tensor, Tensor] = _LossesOfLogits.apply(  # type: ignore[no-untyped-call]
            head(piece_CD), target_CV, labels_N[at], weights
        )
        return found

    if parameters is None:
        total, parts = _sum_recomputed(weighted, chunk_tokens, hidden_ND)
    else:
        total, parts = _SumOverChunks.apply(weighted, chunk_tokens, hidden_ND, *parameters)  # type: ignore[no-untyped-call]
    count = max(len(labels_N), 1)
    return TokenLosses(total / count, parts[0] / count, parts[1] / count)


class _LossesOfLogits(torch.autograd.Function):
    """Weighted sum of both losses over rows of logits, and both sums without weights.

    The gradient is written down, a (p - y) + b (p - q) with p and q the distributions of student
    and teacher, y the label, a and b the weights (`LossWeights`): with a large vocabulary the time
    is that of passes over the logits, and automatic differentiation makes about twice as many. Sums
    are in nats and float32; the gradient has the type of the logits, and can be used once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_CV: Float[Tensor, "C V"],
        target_CV: Float[Tensor, "C V"] | None,
        labels_C: Int[Tensor, " C"],
        weights: LossWeights,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " 2"]]:
        log_p_CV = logits_CV.log_softmax(-1, dtype=torch.float32)
        nll = -log_p_CV.gather(1, labels_C[:, None]).sum()
        kl, q_CV = torch.zeros_like(nll), None
        if target_CV is not None:
            kl, q_CV = _divergence(target_CV, log_p_CV)
        if ctx.needs_input_grad[0]:
            # Without a teacher the weight of distillation is 0.
            slope_CV = log_p_CV.exp_().mul_(weights.cross_entropy + weights.distillation)
            if q_CV is not None:
                slope_CV.sub_(q_CV, alpha=weights.distillation)
            label_C1 = labels_C[:, None]
            own_C1 = torch.full_like(label_C1, -weights.cross_entropy, dtype=torch.float32)
            slope_CV.scatter_add_(1, label_C1, own_C1)
            ctx.save_for_backward(slope_CV.to(logits_CV.dtype))
        parts = torch.stack([nll, kl])
        ctx.mark_non_differentiable(parts)
        return weights.cross_entropy * nll + weights.distillation * kl, parts

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Any, ...]:
        (slope_CV,) = ctx.saved_tensors
        return slope_CV.mul_(grad_total), None, None, None


def _divergence(
    target_CV: Float[Tensor, "C V"], log_p_CV: Float[Tensor, "C V"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "C V"]]:
    """Sum over rows of KL(q || p), and q, the distribution of the target logits."""
    log_q_CV = target_CV.log_softmax(-1, dtype=torch.float32)
    q_CV = log_q_CV.exp()
    return log_q_CV.sub_(log_p_CV).mul_(q_CV).sum(), q_CV


def _sum_recomputed(
    function: Callable[[Tensor, slice], tuple[Tensor, Tensor]], chunk: int, hidden_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum a scalar function over row chunks, each computed again in the backward pass."""
    places = [slice(start, start + chunk) for start in range(0, max(len(hidden_ND), 1), chunk)]
    found = [checkpoint(function, hidden_ND[at], at, use_reentrant=False) for at in places]
    totals, parts = (torch.stack(values).sum(0) for values in zip(*found, strict=True))
    return totals, parts


class _SumOverChunks(torch.autograd.Function):
    """Sum of a scalar function over row chunks, with its gradient computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        chunk: int,
        hidden_ND: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        total, parts = (
            torch.zeros((), device=hidden_ND.device),
            torch.zeros((), device=hidden_ND.device),
        )
        gradients = []
        wanted = any(ctx.needs_input_grad)
        sums = [torch.zeros_like(parameter) for parameter in parameters] if wanted else []
        for start in range(0, max(len(hidden_ND), 1), chunk):
            at = slice(start, start + chunk)
            piece_CD = hidden_ND[at].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                value, chunk_parts = function(piece_CD, at)
            total, parts = total + value.detach(), parts + chunk_parts
            if wanted:
                gradient_CD, *of_parameters = torch.autograd.grad(value, (piece_CD, *parameters))
                gradients.append(gradient_CD)
                for so_far, gradient in zip(sums, of_parameters, strict=True):
                    so_far += gradient
        ctx.save_for_backward(*([torch.cat(gradients), *sums] if wanted else []))
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Any, ...]:
        return None, None, *(grad_total * gradient for gradient in ctx.saved_tensors)
