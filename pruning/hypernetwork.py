"""Logits of all gates of a model, made by one small network from a fixed random input.

Source: DISP-LLM (arXiv 2410.11988), section 3.2 and appendix: a bidirectional GRU over the sites,
LayerNorm, GELU, one bias-free linear head per site.

Differs from the paper's code: the random input is a seeded buffer and is never trained, so that it
cannot drift apart between ranks. `FreeLogits` and `NoRecurrence` are the paper's ablations.

Cost: the heads dominate, 128 weights per gate: 112.2 M parameters for LLaMA-2-7B.

Legend: S = sites, N = all gates, H = features per site, I = entries of a site.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Hypernetwork(nn.Module, ABC):
    """Makes the logits of all gates; everything that is trained when masks are learned."""

    @abstractmethod
    def forward(self) -> Float[Tensor, " N"]:
        """Logits of all N gates, in the order of the sites."""


class _Heads(nn.Module):
    """One bias-free linear head per site; heads of equal size share one batched product."""

    def __init__(self, sizes: Sequence[int], features: int) -> None:
        super().__init__()
        self.sizes = list(sizes)
        bound = 1 / math.sqrt(features)
        self.weights = nn.ParameterDict(
            {
                str(size): nn.Parameter(
                    torch.empty(self.sizes.count(size), size, features).uniform_(-bound, bound)
                )
                for size in sorted(set(self.sizes))
            }
        )

    def forward(self, features_SH: Float[Tensor, "S H"]) -> Float[Tensor, " N"]:
        logits: list[Tensor] = [features_SH] * len(self.sizes)
        for size, weight_SIH in self.weights.items():
            places = [place for place, s in enumerate(self.sizes) if s == int(size)]
            of_size_SI = torch.bmm(weight_SIH, features_SH[places].unsqueeze(-1)).squeeze(-1)
            for place, logits_I in zip(places, of_size_SI, strict=True):
                logits[place] = logits_I
        return torch.cat(logits)


class GRUHypernetwork(Hypernetwork):
    """The hypernetwork of DISP-LLM.

    Args:
        sizes: Entries of every site, in order.
        input_size: Width of the fixed random input of a site, 1 or more.
        hidden_size: Width of the GRU per direction, 1 or more; a head has twice as many features.
        seed: Seed of the input and of the initial weights, 0 or more.
    """

    def __init__(
        self, sizes: Sequence[int], input_size: int = 32, hidden_size: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        self.input: Tensor
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
            self.register_buffer("input", torch.randn(len(sizes), 1, input_size))
            self.gru = nn.GRU(input_size, hidden_size, bidirectional=True)
            self.norm = nn.LayerNorm(2 * hidden_size)
            self.heads = _Heads(sizes, 2 * hidden_size)

    def forward(self) -> Float[Tensor, " N"]:
        features_SH = self.gru(self.input)[0].squeeze(1)
        logits: Tensor = self.heads(F.gelu(self.norm(features_SH)))
        return logits


class NoRecurrence(Hypernetwork):
    """Ablation: every site has its own fixed features; the sites do not see each other.

    Args:
        sizes: Entries of every site, in order.
        features: Features per site, 1 or more.
        seed: Seed of the features and of the initial weights, 0 or more.
    """

    def __init__(self, sizes: Sequence[int], features: int = 128, seed: int = 0) -> None:
        super().__init__()
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
    """Ablation: no network, the logits themselves are trained from zero.

    Args:
        sizes: Entries of every site, in order.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(sum(sizes)))

    def forward(self) -> Float[Tensor, " N"]:
        return self.logits.clone()
