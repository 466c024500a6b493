"""What all data of token windows share: cache, split, mixture, order, exact resume."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from secateur.modules.data.loader import (
    Joined,
    WindowLoader,
    Windows,
    WindowSampler,
    as_batch,
    joined,
)
from secateur.modules.data.order import Mixed, Order, Shuffled
from secateur.modules.data.sources import find_sources
from secateur.modules.data.tokens import HELD_OUT, TRAIN, cache_key, tokenizer_fingerprint
from secateur.pruning.files.base_model import load_tokenizer
from secateur.pruning.files.settings import refuse_other


class TokenData(LightningDataModule, ABC):
    """Batches of token windows in an order that is a pure function of a seed.

    A subclass says how documents become tokens. The settings are those of `TextData`.

    Args:
        train: What to train on: files, folders, data sets of the hub, one or a list.
        validation: What to validate on; held out of `train` if not given.
        weights: Weights of the entries of `train`, or None.
        tokenizer: Folder or hub id of the tokenizer.
        window_tokens: Tokens of a window, 2 or more.
        batch_size: Windows of a batch on one rank, 1 or more.
        text_field: Field of the text; None if rows are read.
        held_out: Fraction of the documents to hold out, in (0, 1).
        validation_windows: Number of validation windows to use, 1 or more; None for all.
        max_tokens: Tokens to train on, 1 or more; None if the trainer has the length.
        seed: Seed of the order, 0 or more.
        cache_dir: Folder of the tokens; ~/.cache/secateur/tokens if not given.
        num_workers: Processes that read ahead, 0 or more.
        trust_remote_code: Whether Python files of the tokenizer may run.

    Raises:
        ValueError: A setting is outside its range.
    """

    train_windows: Dataset[Tensor]
    """The training text as windows, to calibrate on."""
    validation_set: Dataset[Tensor]
    """The validation text as windows, to measure on."""

    def __init__(
        self,
        *,
        train: str | list[str],
        validation: str | list[str] | None,
        weights: list[float] | None,
        tokenizer: str | None,
        window_tokens: int,
        batch_size: int,
        text_field: str | None,
        held_out: float,
        validation_windows: int | None,
        max_tokens: int | None,
        seed: int,
        cache_dir: str | None,
        num_workers: int,
        trust_remote_code: bool,
    ) -> None:
        super().__init__()
        if not 0 < held_out < 1:
            raise ValueError(f"`held_out` must be in (0, 1), got {held_out}.")
        for name, value, least in (
            ("window_tokens", window_tokens, 2),
            ("batch_size", batch_size, 1),
            ("validation_windows", validation_windows, 1),
            ("max_tokens", max_tokens, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be {least} or more, got {value}.")
        names = [train] if isinstance(train, str) else train
        if weights is not None and (len(weights) != len(names) or not all(w > 0 for w in weights)):
            raise ValueError(
                f"`weights` must have one number above 0 for each of the {len(names)} entries of "
                f"`train`, got {weights}."
            )
        self.train, self.validation, self.weights = train, validation, weights
        self.tokenizer_name, self.trust_remote_code = tokenizer, trust_remote_code
        self.window_tokens, self.batch_size = window_tokens, batch_size
        self.text_field, self.max_tokens = text_field, max_tokens
        self.held_out = held_out if validation is None else None
        self.validation_windows = validation_windows
        self.seed, self.num_workers = seed, num_workers
        self._ready: set[Path] = set()  # cache entries that exist and are complete
        self.cache_dir = Path(expanduser(cache_dir or "~/.cache/secateur/tokens"))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ValueError: It is not set, or is not a tokenizer.
        """
        if self.tokenizer_name is None:
            raise ValueError("`tokenizer` must be set: the folder or hub id of a tokenizer.")
        try:
            folder = Path(expanduser(self.tokenizer_name))
            return load_tokenizer(folder, self.trust_remote_code)
        except ValueError as error:
            raise ValueError(
                f"`tokenizer` {self.tokenizer_name!r} is not the folder or hub id of a tokenizer: "
                f"{error}"
            ) from error

    @property
    @abstractmethod
    def form(self) -> str:
        """What decides, beside the tokenizer, how a document is encoded; part of the cache key."""

    @abstractmethod
    def write(self, setting: str, held_out: float | None, entry: Path) -> None:
        """Write the cache entry of a setting, `train` or `validation`, unless it is there."""

    @property
    @abstractmethod
    def tokens_per_window(self) -> float:
        """Mean tokens of what one batch has `batch_size` of, without padding; after `setup`."""

    @property
    def fingerprint(self) -> str:
        """Hash of the windows and their order, hex, 64 digits; independent of file paths."""
        texts = [entry.name for entry in self._entries.values()]
        text = f"{texts} {self.window_tokens} {self.validation_windows} {self.seed}"
        if self.weights is not None:
            text += f" {self.weights}"
        return hashlib.sha256(text.encode()).hexdigest()

    def prepare_data(self) -> None:
        """Tokenise what the cache lacks; called once per machine, and by `setup`."""
        for setting, entry in self._entries.items():
            if entry not in self._ready:
                self.write(setting, None if setting == "validation" else self.held_out, entry)
            self._ready.add(entry)

    def setup(self, stage: str | None = None) -> None:
        """Cut the windows, and set the length of training if `max_tokens` is given.

        Raises:
            ValueError: There is no text, less than one window, or the length is set twice.
        """
        self.prepare_data()  # does nothing, except on ranks that do not share a disk
        parts = {name: entry for name, entry in self._entries.items() if name != "validation"}
        found = [self._split(name, entry) for name, entry in parts.items()]
        self.train_windows = joined([train for train, _ in found])
        asides = [aside for _, aside in found if aside is not None]
        if self.validation is not None:
            asides = [self._cut("validation", self._entries["validation"] / TRAIN)]
        if self.validation_windows is not None:
            for aside in asides:
                aside.count = min(len(aside), -(-self.validation_windows // len(asides)))
        self.validation_set = joined(asides)
        self.cut_batches()
        if stage == "fit" and self.max_tokens is not None and self.trainer is not None:
            self._set_length(self.trainer, self.max_tokens)

    def cut_batches(self) -> None:
        """Prepare what batches are made of, where that is not windows of text."""

    @property
    def train_parts(self) -> list[Dataset[Any]]:
        """What training batches are made of, one data set per source."""
        windows: Any = self.train_windows
        return list(windows.parts) if isinstance(windows, Joined) else [windows]

    @property
    def measured(self) -> Dataset[Any]:
        """What validation batches are made of."""
        return self.validation_set

    @property
    def collate(self) -> Callable[[Any], dict[str, Tensor]]:
        """Makes a batch of what was read."""
        return as_batch

    def lengths_of(self, part: Dataset[Any]) -> Sequence[int] | None:
        """Tokens of each item of a training part; None if all are windows."""
        return None

    def largest_token(self) -> int:
        """The largest token id in the text, that is held out included; reads all of it."""
        arrays = [entry / name for entry in self._entries.values() for name in (TRAIN, HELD_OUT)]
        return max(int(np.load(path, mmap_mode="r").max(initial=0)) for path in arrays)

    def train_dataloader(self) -> WindowLoader:
        """Shuffled full batches of this rank, resumable at any batch."""
        data = joined(self.train_parts)
        sampler = WindowSampler(
            len(data),
            self.batch_size,
            self.seed,
            self._rank,
            self._num_ranks,
            self.trainer.accumulate_grad_batches if self.trainer else 1,
            self._order(),
        )
        return WindowLoader(data, sampler, self.num_workers, self.collate)

    def _order(self) -> Order:
        orders = [
            Shuffled(len(part), self.seed, self.lengths_of(part))  # type: ignore[arg-type]
            for part in self.train_parts
        ]
        return Mixed(orders, self.weights, self.seed) if self.weights else orders[0]

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation windows of this rank in order, equally many on every rank.

        Raises:
            ValueError: There are fewer windows than ranks.
        """
        data: Any = self.measured
        each, rest = divmod(len(data), self._num_ranks)
        if not each:
            raise ValueError(
                f"`validation` gives {len(data)} windows for {self._num_ranks} "
                "ranks; give more text or shorten `window_tokens`."
            )
        if rest:  # ranks that run different numbers of batches would wait for each other forever
            rank_zero_info(f"Validation leaves out {rest} windows so that all ranks have as many.")
        mine = range(self._rank, each * self._num_ranks, self._num_ranks)
        return DataLoader(
            Subset(data, mine),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self.collate,
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """What validation uses."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """What validation uses."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """The hash of the data, for the checkpoint."""
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume on other data, another tokenizer or another order.

        Raises:
            ValueError: The data are not those of the checkpoint.
        """
        refuse_other(state_dict, self.state_dict(), type(self).__name__)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _num_ranks(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @cached_property
    def _sources(self) -> dict[str, Any]:
        texts: dict[str, Any] = {"train": self.train, "validation": self.validation}
        if self.weights is not None and not isinstance(self.train, str):
            texts = {f"train[{n}]": name for n, name in enumerate(self.train)} | texts
            del texts["train"]
        return {
            setting: find_sources(setting, names, self.text_field)
            for setting, names in texts.items()
            if names is not None
        }

    @cached_property
    def _entries(self) -> dict[str, Path]:
        tokenizer = tokenizer_fingerprint(self.tokenizer)
        return {
            setting: self.cache_dir
            / cache_key(
                sources,
                tokenizer,
                self.form,
                None if setting == "validation" else self.held_out,
            )
            for setting, sources in self._sources.items()
        }

    def _set_length(self, trainer: Trainer, max_tokens: int) -> None:
        windows = self.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        steps = math.ceil(max_tokens / (self.tokens_per_window * windows))
        if trainer.max_steps not in (-1, steps):
            raise ValueError(
                f"`data.max_tokens` {max_tokens} is {steps} steps, and `trainer.max_steps` is "
                f"{trainer.max_steps}; leave out one of the two."
            )
        trainer.fit_loop.epoch_loop.max_steps = steps
        rank_zero_info(f"`max_tokens` {max_tokens:,} are {steps:,} steps.")

    def _split(self, setting: str, entry: Path) -> tuple[Windows, Windows | None]:
        """The windows of a training source, and those held out of it."""
        if self.validation is not None:
            return self._cut(setting, entry / TRAIN), None
        if _length(entry / HELD_OUT):
            return self._cut(setting, entry / TRAIN), self._cut("held_out", entry / HELD_OUT)
        return self._cut_tail(setting, entry / TRAIN)

    def _cut(self, setting: str, path: Path) -> Windows:
        tokens = _length(path)
        if tokens == 0:
            raise ValueError(f"`{setting}` holds no text; give files with text in them.")
        count, rest = divmod(tokens, self.window_tokens)
        if count == 0:
            raise ValueError(
                f"`{setting}` has {tokens} tokens, less than one window of `window_tokens` "
                f"{self.window_tokens}; give more text or shorten the window."
            )
        rank_zero_info(
            f"{setting}: {tokens:,} tokens, {count:,} windows of {self.window_tokens}; the last "
            f"{rest} tokens do not fill a window and are left out."
        )
        return Windows(path, self.window_tokens, 0, count)

    def _cut_tail(self, setting: str, path: Path) -> tuple[Windows, Windows]:
        assert self.held_out is not None
        windows = self._cut(setting, path)
        aside = max(1, round(self.held_out * len(windows)))
        if aside >= len(windows):
            raise ValueError(
                f"`{setting}` has {len(windows)} windows of `window_tokens` {self.window_tokens}, "
                f"too few to hold out {self.held_out} of them; give `validation` or more text."
            )
        rank_zero_info(
            f"{setting}: too few documents to hold out {self.held_out} of them; the last {aside} "
            "windows are held out instead."
        )
        windows.count -= aside
        return windows, Windows(path, self.window_tokens, len(windows), aside)


def check_window(window_tokens: int, config: PreTrainedConfig) -> None:
    """Check that a window fits the positions of a model.

    Raises:
        ValueError: It does not fit.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and window_tokens > positions:
        raise ValueError(
            f"`window_tokens` {window_tokens} is longer than the {positions} positions of the "
            f"model; choose at most {positions}."
        )


def check_vocabulary(data: TokenData, config: PreTrainedConfig) -> None:
    """Check that a model has an embedding for every token of the text.

    A tokenizer may have more: that of Gemma 3 has a token for images.

    Raises:
        ValueError: A token has no embedding.
    """
    if max(data.tokenizer.get_vocab().values()) < config.vocab_size:
        return
    if (largest := data.largest_token()) >= config.vocab_size:
        token = data.tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"`tokenizer` makes of the text the id {largest} ({token!r}), and the vocabulary of "
            f"the model has {config.vocab_size} entries; use the tokenizer that the model was "
            "trained with."
        )


def _length(path: Path) -> int:
    return len(np.load(path, mmap_mode="r"))
