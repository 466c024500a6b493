"""What a user wants, as the fraction of the FLOPs of the blocks that may stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from secateur.pruning.advise.probe import Times
from secateur.pruning.costs import Bytes
from secateur.pruning.families import skeleton
from secateur.pruning.heads import head_dim, num_groups
from secateur.pruning.measure.sizes import count


class Wish(ABC):
    """What is to be reached."""

    @abstractmethod
    def keep(self, config: PreTrainedConfig, dtype: torch.dtype, times: Times) -> float:
        """Fraction of the FLOPs of the blocks that stays, in (0, 1).

        Args:
            config: Of the model.
            dtype: Type of its weights.
            times: How long its passes take here.

        Raises:
            ValueError: It is reached already, or cannot be reached by smaller blocks.
        """

    @abstractmethod
    def said(self, keep: float) -> str:
        """How the wish became a fraction, in words."""

    def also(self, config: PreTrainedConfig, dtype: torch.dtype) -> list[str]:
        """Lines on a budget that counts what is wished for itself; arguments as for `keep`."""
        return []


@dataclass(frozen=True)
class Keep(Wish):
    """A fraction of the FLOPs of the blocks.

    Args:
        fraction: What stays, in (0, 1).

    Raises:
        ValueError: `fraction` is out of its range.
    """

    fraction: float

    def __post_init__(self) -> None:
        _check_fraction("--keep", self.fraction)

    def keep(self, config: PreTrainedConfig, dtype: torch.dtype, times: Times) -> float:
        return self.fraction

    def said(self, keep: float) -> str:
        return f"{keep:.1%} of the FLOPs of the blocks stay, as asked for"


@dataclass(frozen=True)
class Fits(Wish):
    """An amount of memory that weights and cache have to fit in.

    Args:
        num_bytes: The memory, above 0.
        context_tokens: Tokens of the cache of one sequence, 0 or more.

    Raises:
        ValueError: `context_tokens` is below 0.
    """

    num_bytes: float
    context_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.context_tokens < 0:
            raise ValueError(f"`--context` must be 0 or more, got {self.context_tokens}.")

    def keep(self, config: PreTrainedConfig, dtype: torch.dtype, times: Times) -> float:
        counts = count(skeleton(config))
        blocks = counts.block_projection_parameters * dtype.itemsize
        fixed = counts.parameters * dtype.itemsize - blocks
        fixed += self.context_tokens * cache_bytes_per_token(config, dtype)
        keep = (self.num_bytes - fixed) / blocks
        need = f"weights ({dtype}) and a cache of {self.context_tokens} tokens"
        if keep >= 1:
            raise ValueError(f"`--fits`: {need} take {(fixed + blocks) / 1e9:.2f} GB, and fit.")
        if keep <= 0:
            raise ValueError(
                f"`--fits` {self.num_bytes / 1e9:.2f} GB: embeddings and a cache of "
                f"{self.context_tokens} tokens alone take {fixed / 1e9:.2f} GB; lower `--context`."
            )
        return keep

    def said(self, keep: float) -> str:
        return (
            f"{keep:.1%} of the blocks stay, so that weights and a cache of "
            f"{self.context_tokens:,} tokens fit {self.num_bytes / 1e9:.2f} GB (counted; what a "
            "server needs beside is not)"
        )

    def also(self, config: PreTrainedConfig, dtype: torch.dtype) -> list[str]:
        bits = 8.0 * dtype.itemsize
        cost = Bytes(self.context_tokens, 1, bits, bits, bits)
        keep = self.num_bytes / cost.table(skeleton(config)).dense
        return [
            "Widths can be chosen by these bytes instead of FLOPs: --model.budget.cost Bytes "
            f"--model.budget.cost.context_tokens {self.context_tokens} --model.budget.keep "
            f"{keep:.4f} (bits per weight, other parameter and cache: {bits:g}, as the files)."
        ]


@dataclass(frozen=True)
class Latency(Wish):
    """A fraction of the time of a forward pass.

    Time is taken to be a straight line through that of all blocks and that of half of them, which
    fits removed blocks; narrower ones of the same FLOPs are slower.

    Args:
        fraction: What is left of the time, in (0, 1).

    Raises:
        ValueError: `fraction` is out of its range.
    """

    fraction: float

    def __post_init__(self) -> None:
        _check_fraction("--latency", self.fraction)

    def keep(self, config: PreTrainedConfig, dtype: torch.dtype, times: Times) -> float:
        num_blocks = config.num_hidden_layers
        half = (num_blocks + 1) // 2 / num_blocks  # of which every second one was bypassed
        slope = (times.forward - times.half_forward) / (1 - half)
        keep = 1 - (1 - self.fraction) * times.forward / slope if slope > 0 else 0.0
        if keep <= 0:
            raise ValueError(
                f"`--latency` {self.fraction}: half of the blocks take "
                f"{times.half_forward / times.forward:.2f} of the time here, so that no fewer "
                "blocks reach it; ask for more, or measure on the machine that serves."
            )
        return keep

    def said(self, keep: float) -> str:
        return (
            f"{keep:.1%} of the blocks stay for {self.fraction:.2f} of the time of a prefill, "
            "measured here with all blocks and with half of them; decoding is not measured, and "
            "narrower blocks gain less time than removed ones"
        )

    def also(self, config: PreTrainedConfig, dtype: torch.dtype) -> list[str]:
        return [
            "Widths can be chosen by measured times instead of FLOPs, see `python -m secateur "
            "latency --help`."
        ]


def _check_fraction(option: str, fraction: float) -> None:
    """Refuse a fraction outside (0, 1).

    Raises:
        ValueError: It is out of its range.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`{option}` must be in (0, 1), got {fraction}.")


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token, all blocks."""
    features = num_groups(config) * head_dim(config)
    return int(2 * config.num_hidden_layers * features * dtype.itemsize)
