"""Ranks of an export: one process with both models in memory, or all ranks with streamed models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed
from transformers import PreTrainedModel

from secateur.pruning.export.streamed import streamed
from secateur.pruning.export.verify import ExportError
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure.generation import prompts_for
from secateur.pruning.measure.latency_table import LatencyTable
from secateur.pruning.measure.perplexity import of_windows, window_nll
from secateur.pruning.measure.report import Report, measure
from secateur.pruning.measure.row import Row
from secateur.pruning.measure.sizes import count, file_bytes

T = TypeVar("T")
_BATCH = 8  # windows per batch; a streamed model is read once per batch


class Ranks(ABC):
    """The processes of an export; every one calls every method."""

    first: bool
    """Whether this process writes."""
    device: torch.device
    """Device of this process."""

    @abstractmethod
    def together(self, work: Callable[[], T]) -> list[T]:
        """Call a function on every rank, and return the results, rank by rank.

        Raises:
            ValueError: It failed on some rank; raised on all ranks, so that none waits for the
                others.
        """

    @abstractmethod
    def share(self, windows_NT: Tensor) -> Tensor:
        """Return the windows that this rank compares two models on."""

    @abstractmethod
    def measure(
        self, dense: PreTrainedModel | Path, folder: Path, name: str, windows_NT: Tensor
    ) -> Report:
        """Measure a model folder beside the dense model.

        Args:
            dense: The dense model, or its folder.
            folder: The new model.
            name: Name of the new model.
            windows_NT: Token windows (int64) to measure on.
        """


class OneRank(Ranks):
    """One process with both models in memory; speed and answers are measured, too.

    Args:
        dense_folder: Folder of the dense model, for the size of its files.
        device: Device of the computation.
        latency: Table of times whose predictions are told; None for no predictions.
    """

    first = True

    def __init__(
        self, dense_folder: Path, device: torch.device, latency: LatencyTable | None = None
    ) -> None:
        self.dense_folder, self.device, self.latency = dense_folder, device, latency

    def together(self, work: Callable[[], T]) -> list[T]:
        return [work()]

    def share(self, windows_NT: Tensor) -> Tensor:
        return windows_NT[:2]

    def measure(
        self, dense: PreTrainedModel | Path, folder: Path, name: str, windows_NT: Tensor
    ) -> Report:
        assert isinstance(dense, PreTrainedModel)
        base = BaseModel(folder)
        # A folder without a tokenizer is a model, too, but nobody can read what it answers.
        tokenizer = base.tokenizer() if any(folder.glob("tokenizer*")) else None
        return measure(
            {"dense": dense, name: base.load(dense.dtype, dense.device)},
            {"validation": windows_NT},
            folders={"dense": self.dense_folder, name: folder},
            speed=speed_settings(windows_NT),
            tokenizer=tokenizer,
            prompts=prompts_for(tokenizer, windows_NT) if tokenizer else (),
            latency=self.latency,
        )


class AllRanks(Ranks):
    """All ranks, with models streamed from their files: no rank holds a complete model.

    Speed is not measured, since streaming slows a model down. Every rank must be able to read the
    files that rank 0 writes.

    Args:
        device: Device of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.first = device, distributed.get_rank() == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        mine: tuple[Any, str | None]
        try:
            mine = work(), None
        except (OSError, ValueError, SafetensorError) as error:
            mine = None, f"{type(error).__name__}: {error}"
        every: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(every, mine)
        failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(every) if error]
        if failed:
            raise ExportError("\n".join(failed))
        return [result for result, _ in every]

    def share(self, windows_NT: Tensor) -> Tensor:
        rank = distributed.get_rank() % len(windows_NT)
        return windows_NT[rank : rank + 1]

    def measure(
        self, dense: PreTrainedModel | Path, folder: Path, name: str, windows_NT: Tensor
    ) -> Report:
        assert isinstance(dense, Path)
        num_ranks = distributed.get_world_size()
        rows, dtype = [], None
        for label, place in (("dense", dense), (name, folder)):
            with streamed(place, self.device) as model:
                nll_N = self._nll(model, windows_NT)
                quality = {"validation": of_windows(nll_N, windows_NT.shape[1])}
                rows.append(Row(label, quality, count(model), file_bytes=file_bytes(place)))
                dtype = dtype or str(model.dtype).removeprefix("torch.")
        conditions = {"device": self.device.type, "dtype": dtype, "ranks": num_ranks}
        return Report(rows, windows_NT.shape[1], conditions)

    def _nll(self, model: Any, windows_NT: Tensor) -> Tensor:
        """Loss of every window, float64 of shape (N,); each rank computes some windows."""
        rank, num_ranks = distributed.get_rank(), distributed.get_world_size()

        @torch.inference_mode()
        def mine() -> list[float]:
            batches = windows_NT[rank::num_ranks].split(_BATCH) if rank < len(windows_NT) else ()
            return [nll for b in batches for nll in window_nll(model, b.to(self.device)).tolist()]

        nll_N = torch.zeros(len(windows_NT), dtype=torch.float64)
        for other, of_rank in enumerate(self.together(mine)):
            nll_N[other::num_ranks] = torch.tensor(of_rank, dtype=torch.float64)
        return nll_N


def speed_settings(windows_NT: Tensor) -> dict[str, int]:
    """Choose prompt and decoded tokens for windows of shape (N, T)."""
    prompt = max(1, windows_NT.shape[1] // 2)
    return {"batch_size": 1, "prompt_tokens": prompt, "new_tokens": min(32, prompt), "repeats": 3}
