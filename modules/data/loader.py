"""Windows of tokens in an order that survives interruption and another number of ranks.

The samples of a run form one infinite sequence, see `modules/data/order.py`. A global batch takes
the next batch_size x ranks samples, rank r the r-th slice of it. So one number, the samples taken
by all ranks together, defines the position of a run, and the content of a batch does not depend on
the number of ranks or workers.

Legend: B = windows of a batch, T = tokens of a window.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from secateur.modules.data.order import Order, Shuffled


class Windows(Dataset[Tensor]):
    """Consecutive windows of a token array on disk, read on access.

    Args:
        path: One-dimensional .npy file of token ids.
        window_tokens: Tokens of a window.
        first: Index in the file of the first window.
        count: Number of windows.
    """

    def __init__(self, path: Path, window_tokens: int, first: int, count: int) -> None:
        self.path, self.window_tokens = path, window_tokens
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Several windows at once, int64 of shape (B, T)."""
        return torch.from_numpy(self._windows[np.asarray(indices) + self.first].astype(np.int64))

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process opens the file itself: pickling a memory map would copy all of the data.
        return Windows, (self.path, self.window_tokens, self.first, self.count)

    @cached_property
    def _windows(self) -> np.ndarray[Any, Any]:
        tokens = np.load(self.path, mmap_mode="r")
        whole = len(tokens) - len(tokens) % self.window_tokens
        windows: np.ndarray[Any, Any] = tokens[:whole].reshape(-1, self.window_tokens)
        return windows


class Joined(Dataset[Any]):
    """Several data sets, one after the other.

    Args:
        parts: The data sets, one or more.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts
        self.ends = [*accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Any:
        place = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[place][index - self.ends[place] + len(self.parts[place])]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Several at once: windows as one tensor (B, T), all else as a list."""
        found = [self[int(index)] for index in indices]
        return torch.stack(found) if isinstance(found[0], Tensor) else found


def joined(parts: Sequence[Any]) -> Any:
    """One data set of several; a single one as it is."""
    return parts[0] if len(parts) == 1 else Joined(parts)


def as_batch(windows_BT: Any) -> dict[str, Tensor]:
    """The batch of a module: `input_ids`, int64 of shape (B, T)."""
    return {"input_ids": windows_BT}


class WindowSampler(Sampler[list[int]]):
    """Sampler of the batches of one rank, full ones only; its state is one number.

    One iteration has as many global batches as the windows fill, rounded down to complete optimiser
    steps. The remaining windows come first in the next iteration.

    Args:
        num_windows: Number of windows.
        batch_size: Windows of a batch on one rank, 1 or more.
        seed: Seed of the order.
        rank: This rank, in [0, num_ranks).
        num_ranks: Number of ranks, 1 or more.
        batches_per_step: Batches of one optimiser step, 1 or more.
        order: The order of the windows; `Shuffled` by the seed if not given.

    Raises:
        ValueError: The windows do not fill one step.
    """

    def __init__(
        self,
        num_windows: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        batches_per_step: int = 1,
        order: Order | None = None,
    ) -> None:
        self.global_batch = batch_size * num_ranks
        if num_windows < self.global_batch * batches_per_step:
            batches = f" in {batches_per_step} batches" if batches_per_step > 1 else ""
            raise ValueError(
                f"`batch_size` {batch_size} on {num_ranks} ranks{batches} needs "
                f"{self.global_batch * batches_per_step} windows per step, the training text has "
                f"{num_windows}; lower `batch_size` or `window_tokens`, or give more text."
            )
        self.num_windows, self.batch_size = num_windows, batch_size
        self.batches_per_step = batches_per_step
        self.order, self.rank = order or Shuffled(num_windows, seed), rank
        self.samples = 0

    def __len__(self) -> int:
        steps = self.num_windows // (self.global_batch * self.batches_per_step)
        return steps * self.batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            start = self.samples + self.rank * self.batch_size
            self.samples += self.global_batch
            yield [self.order(sample) for sample in range(start, start + self.batch_size)]

    def state_dict(self) -> dict[str, int]:
        """Number of samples taken so far by all ranks together."""
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after this number of samples."""
        self.samples = state["samples"]


class WindowLoader(StatefulDataLoader):  # type: ignore[misc]
    """Loader of a `WindowSampler` whose state is only that of the sampler.

    torchdata stores, with every batch that it returns, the state of the sampler at that batch, even
    if its workers have read further ahead. The state of torchdata's loader includes the workers,
    and can be restored only with the same number of them; the state of the sampler can always be
    restored.

    Args:
        windows: The windows.
        sampler: Their order.
        num_workers: Processes that read ahead, 0 or more.
        collate: Makes a batch of the windows that were read.
    """

    def __init__(
        self,
        windows: Dataset[Any],
        sampler: WindowSampler,
        num_workers: int = 0,
        collate: Callable[[Any], dict[str, Tensor]] = as_batch,
    ) -> None:
        with warnings.catch_warnings():
            # torchdata 0.11 counts its use by a function of torch that newer releases deprecate.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            super().__init__(
                windows, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate
            )

    def __iter__(self) -> Iterator[Any]:
        if self._iterator is not None:
            # Lightning ends an epoch by counting batches; the workers may have read further.
            self.load_state_dict(self.state_dict())
        iterator: Iterator[Any] = super().__iter__()
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """Number of samples that all ranks together have received so far."""
        if self._iterator is None:
            return dict(self.batch_sampler.state_dict())
        state = super().state_dict()
        main = state["_snapshot"]["_main_snapshot"] if self.num_workers else state
        return dict(main["_index_sampler_state"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, with any number of ranks and workers."""
        super().load_state_dict({})  # forget the iterator
        self.batch_sampler.load_state_dict(state_dict)
