"""Logits of all gates of a model, computed by one small network from a fixed random input.

Source: DISP-LLM (arXiv 2410.11988), section 3.2 and appendix: a bidirectional GRU over the sites,
LayerNorm, GELU, one bias-free linear head per site.

Differs from the paper's code: the random input is a seeded buffer and is never trained, so that it
is equal on all ranks. `FreeLogits` and `NoRecurrence` are the paper's ablations.
`SharedHeads` is ours.

Cost: the heads dominate, 128 weights per gate: 112.2 M parameters for LLaMA-2-7B, 629 M at 70B, 16
bytes each with AdamW. A `head_stride` of 11 leaves 9.4 % of them; `SharedHeads` has 2.8 and 9.7 M,
`FreeLogits` 0.9 and 4.9 M; docs/disp.md compares the masks that they learn.

Effect of the width of a head: AdamW changes every weight by about the learning rate, so a step
changes a logit by the learning rate times the sum of |feature| over its weights, 0.4 x 128 = 51 for
GELU of normalised features. A gate with a single parameter needs this factor explicitly, or it
hardly changes: `step_scale`.

Legend: S = sites, N = all gates, H = features per site, I = entries of a site, C = sites of one
size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Hypernetwork(nn.Module, ABC):
    """A network that computes the logits of all gates: all parameters of mask learning."""

    @abstractmethod
    def forward(self) -> Float[Tensor, " N"]:
        """Logits of all N gates, in the order of the sites."""


def _places(sizes: Sequence[int]) -> dict[int, list[int]]:
    """The positions of the sites of each size."""
    return {size: [i for i, s in enumerate(sizes) if s == size] for size in sorted(set(sizes))}


def _in_order(logits_CI: Mapping[int, Tensor], sizes: Sequence[int]) -> Tensor:
    """Logits (N,) in the order of the sites, from one matrix (C, I) per size."""
    rows = {size: iter(logits) for size, logits in logits_CI.items()}
    return torch.cat([next(rows[size]) for size in sizes])


def _check_sizes(**sizes: int) -> None:
    """Raise a ValueError for a size below 1; torch would name none."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {size}.")


def _uniform(*shape: int) -> nn.Parameter:
    """Initial weights of linear layers; the last axis has the features."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class _Heads(nn.Module):
    """One bias-free linear head per site; heads of equal size share one batched product."""

    def __init__(self, sizes: Sequence[int], features: int) -> None:
        super().__init__()
        self.sizes, self.places = list(sizes), _places(sizes)
        self.weights = nn.ParameterDict(
            {
                str(size): _uniform(len(places), size, features)
                for size, places in self.places.items()
            }
        )

    def forward(self, features_SH: Float[Tensor, "S H"]) -> Float[Tensor, " N"]:
        logits_CI = {
            size: torch.bmm(self.weights[str(size)], features_SH[places].unsqueeze(-1)).squeeze(-1)
            for size, places in self.places.items()
        }
        return _in_order(logits_CI, self.sizes)


class GRUHypernetwork(Hypernetwork):
    """The hypernetwork of DISP-LLM.

    Args:
        sizes: Entries of every site, in order.
        input_size: Width of the fixed random input of a site, 1 or more.
        hidden_size: Width of the GRU per direction, 1 or more; there are twice as many features.
        head_stride: Heads read every feature (1) or every n-th, multiplied by n: n times fewer
            parameters, while a step changes a logit by as much. 11 leaves 12 of 128 features, less
            than a tenth of the paper's parameters; docs/disp.md has the effect on quality.
        seed: Seed of the input and of the initial weights, 0 or more.

    Raises:
        ValueError: A size is below 1, or `head_stride` is not between 1 and the number of features.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        input_size: int = 32,
        hidden_size: int = 64,
        head_stride: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes(input_size=input_size, hidden_size=hidden_size)
        features = 2 * hidden_size
        if not 1 <= head_stride <= features:
            raise ValueError(f"`head_stride` must be in 1 to {features}, got {head_stride}.")
        self.head_stride = head_stride
        self.input: Tensor
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
            self.register_buffer("input", torch.randn(len(sizes), 1, input_size))
            self.gru = nn.GRU(input_size, hidden_size, bidirectional=True)
            self.norm = nn.LayerNorm(features)
            read = -(-features // head_stride)
            self.heads = _Heads(sizes, read)
        with torch.no_grad():  # so that initial logits are as small as with all features
            for weight in self.heads.parameters():
                weight.mul_(read / features)

    def forward(self) -> Float[Tensor, " N"]:
        features_SH = F.gelu(self.norm(self.gru(self.input)[0].squeeze(1)))
        logits: Tensor = self.heads(self.head_stride * features_SH[:, :: self.head_stride])
        return logits

    def extra_repr(self) -> str:
        """The settings as text, to compare runs."""
        return "" if self.head_stride == 1 else f"head_stride={self.head_stride}"


class SharedHeads(Hypernetwork):
    """The hypernetwork of DISP-LLM with one head for all sites of equal size.

    A site's logits are head(features of the site) + step_scale x (a number per gate). The head
    represents what entries of the residual stream have in common over the blocks; the numbers make
    every mask reachable.

    Args:
        sizes: Entries of every site, in order.
        input_size: Width of the fixed random input of a site, 1 or more.
        hidden_size: Width of the GRU per direction, 1 or more; a head has twice as many features.
        step_scale: Change of a gate's logit through its own number in one step of AdamW, in
            learning rates, above 0.
        seed: Seed of the input and of the initial weights, 0 or more.

    Raises:
        ValueError: A size is below 1, or `step_scale` is not above 0.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        input_size: int = 32,
        hidden_size: int = 64,
        step_scale: float = 50.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes(input_size=input_size, hidden_size=hidden_size)
        self.input: Tensor
        self.sizes, self.places = list(sizes), _places(sizes)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
            self.register_buffer("input", torch.randn(len(sizes), 1, input_size))
            self.gru = nn.GRU(input_size, hidden_size, bidirectional=True)
            self.norm = nn.LayerNorm(2 * hidden_size)
            self.heads = nn.ParameterDict(
                {str(size): _uniform(size, 2 * hidden_size) for size in self.places}
            )
        self.own = FreeLogits(sizes, step_scale)

    def forward(self) -> Float[Tensor, " N"]:
        features_SH = F.gelu(self.norm(self.gru(self.input)[0].squeeze(1)))
        logits_CI = {
            size: features_SH[places] @ self.heads[str(size)].T
            for size, places in self.places.items()
        }
        logits: Tensor = _in_order(logits_CI, self.sizes) + self.own()
        return logits


class NoRecurrence(Hypernetwork):
    """Ablation: every site has its own fixed features; sites do not interact.

    Args:
        sizes: Entries of every site, in order.
        features: Features per site, 1 or more.
        seed: Seed of the features and of the initial weights, 0 or more.

    Raises:
        ValueError: `features` is below 1.
    """

    def __init__(self, sizes: Sequence[int], features: int = 128, seed: int = 0) -> None:
        super().__init__()
        _check_sizes(features=features)
        self.input: Tensor
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
            self.register_buffer("input", torch.randn(len(sizes), features))
            self.norm = nn.LayerNorm(features)
            self.heads = _Heads(sizes, features)

    def forward(self) -> Float[Tensor, " N"]:
        logits: Tensor = self.heads(F.gelu(self.norm(self.input)))
        return logits


class FreeLogits(Hypernetwork):
    """Ablation: no network, one number per gate is trained from zero.

    Args:
        sizes: Entries of every site, in order.
        step_scale: Change of a logit in one step of AdamW, in learning rates, above 0; 1 trains the
            logits themselves.

    Raises:
        ValueError: `step_scale` is not above 0.
    """

    def __init__(self, sizes: Sequence[int], step_scale: float = 1.0) -> None:
        super().__init__()
        if not step_scale > 0:
            raise ValueError(f"`step_scale` must be above 0, got {step_scale}.")
        self.step_scale = step_scale
        self.logits = nn.Parameter(torch.zeros(sum(sizes)))

    def forward(self) -> Float[Tensor, " N"]:
        return self.step_scale * self.logits

    def extra_repr(self) -> str:
        """The settings as text, to compare runs."""
        return f"step_scale={self.step_scale}"
