from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.pruning.losses import LossWeights, TokenLosses, head_of, token_losses
from tests.tiny import tiny_llama

N, D, V = 23, 8, 31
WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.7, 2.0)]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    labels_N = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    return {
        "hidden_ND": draw(N, D, seed=0).requires_grad_(),
        "teacher_ND": draw(N, D, seed=1),
        "weight_VD": draw(V, D, seed=2).requires_grad_(),
        "labels_N": labels_N,
    }


def capped(weight_VD: Tensor, cap: float | None) -> Any:
    def head(hidden: Tensor) -> Tensor:
        logits = hidden @ weight_VD.T
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head


def plain(inputs: dict[str, Tensor], head: Any, ce: float, kl: float) -> TokenLosses:
    """All logits at once, from the definitions."""
    log_p_NV = head(inputs["hidden_ND"]).log_softmax(-1)
    log_q_NV = head(inputs["teacher_ND"]).detach().log_softmax(-1)
    nll = -log_p_NV[torch.arange(N), inputs["labels_N"]].mean()
    divergence = (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(1).mean()
    return TokenLosses(ce * nll + kl * divergence, nll, divergence)


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 7, N, 1000])
@pytest.mark.parametrize(("ce", "kl"), WEIGHTS)
def test_chunks_give_the_losses_and_gradients_of_all_logits_at_once(
    inputs: dict[str, Tensor], ce: float, kl: float, chunk: int, cap: float | None, divided: bool
) -> None:
    head = capped(inputs["weight_VD"], cap)
    wanted = [inputs["hidden_ND"], inputs["weight_VD"]]
    ours = token_losses(
        inputs["hidden_ND"],
        inputs["labels_N"],
        head,
        teacher_ND=inputs["teacher_ND"] if kl else None,
        weights=LossWeights(ce, kl),
        chunk_tokens=chunk,
        parameters=None if divided else [inputs["weight_VD"]],
    )
    theirs = plain(inputs, head, ce, kl)
    torch.testing.assert_close(ours.total, theirs.total)
    torch.testing.assert_close(ours.cross_entropy, theirs.cross_entropy)
    if kl:
        torch.testing.assert_close(ours.distillation, theirs.distillation)
    else:
        assert float(ours.distillation) == 0
    # 3 times the loss: what comes from above must be passed on.
    ours_grad = torch.autograd.grad(3 * ours.total, wanted)
    theirs_grad = torch.autograd.grad(3 * theirs.total, wanted)
    for got, expected in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_a_case_by_hand() -> None:
    # Logits (0, ln 3): p = (1/4, 3/4). Labels 0 and 1: (ln 4 + ln 4/3) / 2 = 0.8370.
    logits = torch.tensor([[0.0, 1.0986123], [0.0, 1.0986123]])
    losses = token_losses(logits, torch.tensor([0, 1]), lambda hidden: hidden)
    assert float(losses.total) == pytest.approx(0.83698, abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_no_more_than_a_chunk_of_logits_is_alive(inputs: dict[str, Tensor], chunk: int) -> None:
    seen: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return hidden @ inputs["weight_VD"].T

    losses = token_losses(
        inputs["hidden_ND"],
        inputs["labels_N"],
        head,
        teacher_ND=inputs["teacher_ND"],
        weights=LossWeights(1.0, 1.0),
        chunk_tokens=chunk,
    )
    losses.total.backward()
    assert max(seen) == chunk
    assert sum(seen) == 2 * N  # student and teacher, each token once: nothing is done twice


def test_without_gradients_none_are_computed(inputs: dict[str, Tensor]) -> None:
    head = capped(inputs["weight_VD"].detach(), None)
    losses = token_losses(inputs["hidden_ND"].detach(), inputs["labels_N"], head)
    assert not losses.total.requires_grad


@pytest.mark.parametrize("weights", [(-1.0, 1.0), (1.0, -0.5), (0.0, 0.0)])
def test_weights_out_of_range_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be 0 or more and not both 0, got "):
        LossWeights(*weights)


def test_the_teacher_gets_no_gradient(inputs: dict[str, Tensor]) -> None:
    teacher_ND = inputs["teacher_ND"].requires_grad_()
    losses = token_losses(
        inputs["hidden_ND"],
        inputs["labels_N"],
        capped(inputs["weight_VD"].detach(), None),
        teacher_ND=teacher_ND,
        weights=LossWeights(1.0, 1.0),
    )
    losses.total.backward()
    assert teacher_ND.grad is None
    assert inputs["hidden_ND"].grad is not None


@pytest.mark.parametrize("cap", [None, 1.5])
def test_the_head_of_a_model_gives_its_logits(cap: float | None) -> None:
    model = tiny_llama()
    model.config.final_logit_softcapping = cap
    ids = torch.arange(12)[None]
    hidden_BTD = model.get_decoder()(input_ids=ids).last_hidden_state
    logits_BTV = model(input_ids=ids).logits  # Llama itself knows no cap
    expected = logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)
    torch.testing.assert_close(head_of(model)(hidden_BTD), expected)


def test_half_precision_is_summed_in_single(inputs: dict[str, Tensor]) -> None:
    hidden_ND = inputs["hidden_ND"].detach().bfloat16().requires_grad_()
    linear = nn.Linear(D, V, bias=False).bfloat16()
    losses = token_losses(hidden_ND, inputs["labels_N"], linear, chunk_tokens=3)
    assert losses.total.dtype == torch.float32
    expected = F.cross_entropy(linear(hidden_ND).float(), inputs["labels_N"])
    torch.testing.assert_close(losses.total, expected)
    losses.total.backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.dtype == torch.bfloat16
