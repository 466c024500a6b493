"""Training once the masks are chosen: gains, low-rank updates, or all weights of the cut model.

A `Settled` model is the model after the masks have settled, with its trained parameters. If every
process holds the complete base model, it is cut, so that a step costs as much as one of the smaller
model; if it is sharded or packed, gates and gains multiply features of the base model.

Legend: F = features on one side of a projection, H = windows held back, N = all gates, W = windows,
T = tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from secateur.pruning.blocks.refit import Refit
from secateur.pruning.export.cut import cut
from secateur.pruning.export.verify import verify_cut
from secateur.pruning.families import blocks_of, family_of, skeleton
from secateur.pruning.lora import LoRA, merged
from secateur.pruning.losses import LossWeights
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.plan import Plan, full_plan
from secateur.pruning.sites import gain_sizes, split
from secateur.pruning.widths.gained_linear import gained_linear
from secateur.pruning.widths.gate_hooks import GateHooks


class Settled(nn.Module, ABC):
    """A model whose masks have settled, and its trained parameters.

    Args:
        model: The cut model, or the base model with gates.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """List what trains."""

    @abstractmethod
    def reset(self) -> None:
        """Restore the model before the first step."""

    def applied(self) -> AbstractContextManager[None]:
        """Apply the trained parameters to the model, for the duration of a `with` block."""
        return nullcontext()

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """The model with the trained parameters merged into its weights, without hooks."""
        yield self.model


class _Gains(Settled):
    """Gains on both sides of every projection of a cut model, which computes with them from now on.

    Its parameters are those of the cut model, so that it can be cut again, with gains folded in.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.requires_grad_(False))
        family = family_of(model.config)
        self.sizes = gain_sizes(skeleton(model.config), family)
        self.gains = nn.Parameter(torch.ones(sum(self.sizes.values()), device=model.device))
        self._applied = self.named()
        for index, block in enumerate(blocks_of(model, family)):
            for projection in family.projections_of(block):
                layer: Any = block.get_submodule(projection.path)
                layer.forward = partial(self._forward, layer, f"{index}.{projection.path}")

    def _forward(self, layer: nn.Linear, name: str, x_NI: Tensor) -> Tensor:
        gains = self._applied
        return gained_linear(layer, x_NI, gains[f"{name}.input"], gains[f"{name}.output"])

    def applied(self) -> AbstractContextManager[None]:
        # Once per step, since every split costs a vector of all gains on the way back. They stay
        # for blocks that are computed again in the backward pass.
        self._applied = self.named()
        return nullcontext()

    def trained(self) -> list[nn.Parameter]:
        return [self.gains]

    def reset(self) -> None:
        nn.init.ones_(self.gains)

    def named(self) -> dict[str, Tensor]:
        """The gains by name, as plans need them."""
        return named_gains(self.gains, self.sizes)

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        gains = {name: gain_F.detach().float().cpu() for name, gain_F in self.named().items()}
        yield cut(self.model, replace(full_plan(self.model, ""), gains=gains))


def named_gains(gains: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Split a vector of all gains into one vector (F,) per name of `gain_sizes`."""
    return dict(zip(sizes, gains.split([*sizes.values()]), strict=True))


class _Weights(Settled):
    """A cut model whose float32 parameters train; products are computed in the type of its weights.

    Below float32 that is bfloat16 only: gradients in float16 would have to be scaled.
    """

    def __init__(self, model: PreTrainedModel, weights: torch.dtype) -> None:
        super().__init__(model)
        self._low = weights == torch.bfloat16

    def applied(self) -> AbstractContextManager[None]:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self._low)


class _LowRank(_Weights):
    """Low-rank updates of a cut model."""

    def __init__(self, model: PreTrainedModel, lora: LoRA) -> None:
        weights = model.dtype
        lora.inject(model)
        super().__init__(model, weights)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def reset(self) -> None:
        for name, parameter in self.model.named_parameters():
            if ".lora_B." in name:
                nn.init.zeros_(parameter)

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        with merged(self.model):
            yield self.model


class _AllWeights(_Weights):
    """All weights of a cut model, in float32; the weights before are kept on the CPU."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.requires_grad_(True), model.dtype)
        model.float()
        self._before = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}

    def trained(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @torch.no_grad()
    def reset(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self._before[name])


class Trained(ABC):
    """Which parameters of the cut model train."""

    # None stands for the usual rate: a class that is put in the place of another one on the
    # command line takes over what the settings of both are called.
    lr: float | None
    usual_lr: ClassVar[float]

    def __post_init__(self) -> None:
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"`lr` must be above 0, got {self.lr}.")

    @property
    def highest_lr(self) -> float:
        """Highest learning rate; it rises over the first tenth of the settled steps and falls to 0
        along a cosine.
        """
        return self.usual_lr if self.lr is None else self.lr

    def check(self, config: PretrainedConfig) -> None:  # noqa: B027 (nothing to check by default)
        """Refuse settings that do not suit a model, by its configuration before the cut."""

    @abstractmethod
    def of(self, model: PreTrainedModel) -> Settled:
        """Prepare a cut model for training; it becomes part of the result."""


@dataclass(frozen=True)
class Gains(Trained):
    """Gains: factors on the features on both sides of every projection; weights are frozen.

    Args:
        lr: Highest learning rate, above 0; 0.02 if not given. It rises over the first tenth of
            the settled steps and falls to 0 along a cosine.
    """

    lr: float | None = None
    usual_lr: ClassVar[float] = 0.02

    def of(self, model: PreTrainedModel) -> Settled:
        return _Gains(model)


@dataclass(frozen=True)
class LowRank(Trained):
    """Low-rank updates of all projections, added to the weights at export.

    Args:
        lora: Rank, scaling and target layers of the updates.
        lr: Highest learning rate, above 0; 0.001 if not given. It rises over the first tenth of
            the settled steps and falls to 0 along a cosine.
    """

    lora: LoRA = field(default_factory=lambda: LoRA(rank=32, alpha=32.0, dropout=0.0))
    lr: float | None = None
    usual_lr: ClassVar[float] = 1e-3

    def check(self, config: PretrainedConfig) -> None:
        self.lora.check(config)

    def of(self, model: PreTrainedModel) -> Settled:
        return _LowRank(model, self.lora)


@dataclass(frozen=True)
class AllWeights(Trained):
    """All weights, in float32 while they train; products of a bfloat16 model stay in bfloat16.

    Args:
        lr: Highest learning rate, above 0; 0.0003 if not given. It rises over the first tenth of
            the settled steps and falls to 0 along a cosine.
    """

    lr: float | None = None
    usual_lr: ClassVar[float] = 3e-4

    def of(self, model: PreTrainedModel) -> Settled:
        return _AllWeights(model)


class MaskedGains(Settled):
    """Gates and gains on the base model, if it cannot be cut.

    Args:
        model: The base model, frozen, not a submodule.
        hooks: Its gates.
    """

    def __init__(self, model: PreTrainedModel, hooks: GateHooks) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "model", model)  # already a submodule of the mask learner
        self.hooks = hooks
        self.sizes = gain_sizes(skeleton(model.config), hooks.family)
        self.gains = nn.Parameter(torch.ones(sum(self.sizes.values())))
        self.gates: Sequence[Tensor] = ()

    def trained(self) -> list[nn.Parameter]:
        return [self.gains]

    def reset(self) -> None:
        nn.init.ones_(self.gains)

    def applied(self) -> AbstractContextManager[None]:
        gates: list[Any] = [gate_I.to(self.gains) for gate_I in self.gates]
        return self.hooks.applied(gates, named_gains(self.gains, self.sizes))

    def moved(self) -> dict[str, Tensor] | None:
        """The gains by name, on the CPU; None if all are still 1."""
        if not bool((self.gains != 1).any()):
            return None
        named = named_gains(self.gains.detach().float().cpu(), self.sizes)
        return {name: gain_F.clone() for name, gain_F in named.items()}


@dataclass(frozen=True)
class Settle:
    """Settings for the steps after the masks are chosen: the model is cut, refitted, and trained.

    If the model is sharded or packed, it is not cut: gains are trained with the masks applied, and
    nothing is refitted.

    Args:
        cut: Cut the model; false always trains gains on the masked base model.
        fraction: Fraction of the training steps in which the settled model trains, in [0, 1]; with
            1, no masks are learned.
        train: Trained parameters: `Gains` (weights are frozen), `LowRank` or `AllWeights`.
        refit: Closed-form refit of the cut weights before training; None leaves them unchanged.
        refit_windows: Windows of the training text to refit weights on, 1 or more.
        held_back_windows: Further windows; refit and training are undone if they raise the
            perplexity on these, 1 or more.
        loss: The training loss.

    Raises:
        ValueError: A setting is outside its range.
    """

    cut: bool = True
    fraction: float = 0.3
    train: Trained = field(default_factory=Gains)
    refit: Refit | None = field(default_factory=Refit)
    refit_windows: int = 256
    held_back_windows: int = 32
    loss: LossWeights = field(default_factory=lambda: LossWeights(0.0, 1.0))

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"`fraction` must be in [0, 1], got {self.fraction}.")
        for name in ("refit_windows", "held_back_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")

    def check_text(self, config: PretrainedConfig, windows: int, window_tokens: int) -> None:
        """Refuse text that is too short to refit on, before masks are learned.

        Args:
            config: Configuration of the dense model.
            windows: Windows of the training text.
            window_tokens: Tokens of a window.

        Raises:
            ValueError: It is too short.
        """
        held = self.held_back_windows
        if (rest := min(windows - held, self.refit_windows)) < 1:
            raise ValueError(
                f"`settle.held_back_windows` is {held}, and `--data.train` has {windows} windows; "
                "lower it, or give more text."
            )
        if self.refit is not None:
            self.refit.check(skeleton(config), (), rest * window_tokens)


def cut_and_refitted(
    dense: PreTrainedModel,
    plan: Plan,
    settle: Settle,
    held_WT: Int[Tensor, "H T"],
    refit_WT: Int[Tensor, "W T"],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Cut a model by a plan, and refit it if that lowers the perplexity of held-back windows.

    Args:
        dense: The model, with all gates open.
        plan: Its kept indices.
        settle: Settings of cut and refit.
        held_WT: Token ids of the windows held back.
        refit_WT: Token ids of the windows to refit on.

    Returns:
        The cut model, and for the report: perplexity of the held-back windows of the cut model, of
        the refitted model, and of the better of both.

    Raises:
        ExportError: The cut model and the masked model disagree.
        ValueError: There is too little text to refit on.
    """
    narrow = cut(dense, plan)
    verify_cut(dense, plan, narrow, held_WT[:2])
    best = perplexity(narrow, held_WT).value
    notes: dict[str, Any] = {"perplexity_cut": best}
    if settle.refit is not None:
        refitted = cut(dense, plan)
        settle.refit(dense, refitted, plan, refit_WT)
        found = perplexity(refitted, held_WT).value
        notes |= {"perplexity_refitted": found, "refit": "kept" if found < best else "left out"}
        if found < best:
            narrow, best = refitted, found
    return narrow, notes | {"perplexity_settled": best}


def perplexity_of_masks(
    model: PreTrainedModel,
    hooks: GateHooks,
    masks: Sequence[Float[Tensor, " N"]],
    windows_WT: Int[Tensor, "W T"],
) -> float:
    """Measure a model with masks applied; with several masks, the exponential of the mean loss.

    Args:
        model: The model.
        hooks: Its gates.
        masks: 1 for kept entries, else 0; one or more, such as those of several budgets.
        windows_WT: Token ids.
    """
    nll = 0.0
    for mask_N in masks:
        with hooks.applied(split(mask_N.to(model.device), hooks.sites)):
            nll += perplexity(model, windows_WT).mean_nll / len(masks)
    return math.exp(nll)


def undo_if_worse(
    settled: Settled, before: float, windows_WT: Int[Tensor, "W T"]
) -> dict[str, Any]:
    """Undo the training of a settled model if it has raised the perplexity of held-back windows.

    Args:
        settled: The trained model.
        before: Perplexity of the windows before it was trained.
        windows_WT: Token ids of the windows held back.

    Returns:
        For the report: the perplexity with the training, and whether it is kept.
    """
    with settled.plain() as model:
        found = perplexity(model, windows_WT).value
    if found > before:
        settled.reset()
    return {"perplexity_trained": found, "training": "kept" if found <= before else "left out"}
