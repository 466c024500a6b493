"""Text as windows of tokens: read, tokenised once, split, shuffled, resumed exactly."""

from __future__ import annotations

import hashlib
from functools import cached_property
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from secateur.modules.data.loader import WindowLoader, Windows, WindowSampler, as_batch
from secateur.modules.data.sources import find_sources
from secateur.modules.data.tokens import (
    HELD_OUT,
    TRAIN,
    cache_key,
    tokenise,
    tokenizer_fingerprint,
)
from secateur.pruning.files.base_model import load_tokenizer
from secateur.pruning.files.settings import refuse_other


class TextData(LightningDataModule):
    """Text as batches of token windows: `input_ids`, int64 of shape (batch_size, window_tokens).

    Documents are encoded with the tokenizer's defaults (BOS in front for Llama and Gemma; if a
    tokenizer adds neither BOS nor EOS, an EOS follows every document), concatenated in order and
    cut into windows. Only the last partial window of a split is dropped. The tokens are cached on
    disk and memory-mapped: later runs and all ranks start at once.

    The order of training is a pure function of `seed`, the same on any number of ranks, and a
    resumed run sees exactly the batches that an uninterrupted one would have seen. Every batch is
    full: windows that do not fill one are the first of the next epoch. Use with
    `use_distributed_sampler=False`, because this class divides the data among ranks.

    Args:
        train: Text to train on: files, folders of files, or data sets of the hub, one or a list.
            Files: .txt (one document), .json (a list of strings or objects), .jsonl, .parquet.
            Folders: all files below except hidden ones, or the output of datasets' `save_to_disk`.
            Hub: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; every row is a document.
        validation: Text to validate on, in the same forms. If not given, documents of `train` are
            held out.
        tokenizer: Folder or hub id of the tokenizer; the command line sets the base model's.
        window_tokens: Tokens of a window, 2 or more, at most the positions of the model.
        batch_size: Windows of a batch on one rank, 1 or more.
        text_field: Field of objects, and column of tables, that holds the text.
        held_out: Fraction of the documents of `train` that is held out if `validation` is not
            given, in (0, 1): every 20th document for 0.05. With too few documents, the last windows
            are held out instead.
        validation_windows: Number of validation windows to use, the first ones, 1 or more; all if
            not given.
        seed: Seed of the training order, 0 or more.
        cache_dir: Folder of the tokenised texts; ~/.cache/secateur/tokens if not given.
        num_workers: Processes that read ahead, 0 or more; 0 is enough, since data is memory-mapped.
        trust_remote_code: Whether Python files that the tokenizer brings may run; as the model says
            where the tokenizer is that of its base.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        tokenizer: str | None = None,
        window_tokens: int = 2048,
        batch_size: int = 1,
        text_field: str = "text",
        held_out: float = 0.05,
        validation_windows: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        num_workers: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < held_out < 1:
            raise ValueError(f"`held_out` must be in (0, 1), got {held_out}.")
        for name, value, least in (
            ("window_tokens", window_tokens, 2),
            ("batch_size", batch_size, 1),
            ("validation_windows", validation_windows, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be {least} or more, got {value}.")
        self.train, self.validation = train, validation
        self.tokenizer_name, self.trust_remote_code = tokenizer, trust_remote_code
        self.window_tokens, self.batch_size = window_tokens, batch_size
        self.text_field = text_field
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
    def fingerprint(self) -> str:
        """Hash of the windows and their order, hex, 64 digits; independent of file paths."""
        texts = [entry.name for entry in self._entries.values()]
        text = f"{texts} {self.window_tokens} {self.validation_windows} {self.seed}"
        return hashlib.sha256(text.encode()).hexdigest()

    def prepare_data(self) -> None:
        """Tokenise text that the cache lacks; called once per machine, and by `setup`."""
        for setting, entry in self._entries.items():
            held_out = self.held_out if setting == "train" else None
            if entry not in self._ready:
                tokenise(self._sources[setting], self.tokenizer, held_out, entry)
            self._ready.add(entry)

    def setup(self, stage: str | None = None) -> None:
        """Cut the windows.

        Raises:
            ValueError: There is no text, or less than one window.
        """
        self.prepare_data()  # does nothing, except on ranks that do not share a disk
        train = self._entries["train"] / TRAIN
        if self.validation is not None:
            self.train_windows = self._cut("train", train)
            self.validation_set = self._cut("validation", self._entries["validation"] / TRAIN)
        elif _length(aside := self._entries["train"] / HELD_OUT):
            self.train_windows = self._cut("train", train)
            self.validation_set = self._cut("held_out", aside)
        else:
            self.train_windows, self.validation_set = self._cut_tail(train)
        if self.validation_windows is not None:
            self.validation_set.count = min(len(self.validation_set), self.validation_windows)

    def largest_token(self) -> int:
        """The largest token id in the text, that is held out included; reads all of it."""
        arrays = [entry / name for entry in self._entries.values() for name in (TRAIN, HELD_OUT)]
        return max(int(np.load(path, mmap_mode="r").max(initial=0)) for path in arrays)

    def train_dataloader(self) -> WindowLoader:
        """Shuffled full batches of this rank, resumable at any batch."""
        sampler = WindowSampler(
            len(self.train_windows),
            self.batch_size,
            self.seed,
            self._rank,
            self._num_ranks,
            self.trainer.accumulate_grad_batches if self.trainer else 1,
        )
        return WindowLoader(self.train_windows, sampler, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation windows of this rank in order, equally many on every rank.

        Raises:
            ValueError: There are fewer windows than ranks.
        """
        each, rest = divmod(len(self.validation_set), self._num_ranks)
        if not each:
            raise ValueError(
                f"`validation` gives {len(self.validation_set)} windows for {self._num_ranks} "
                "ranks; give more text or shorten `window_tokens`."
            )
        if rest:  # ranks that run different numbers of batches would wait for each other forever
            rank_zero_info(f"Validation leaves out {rest} windows so that all ranks have as many.")
        mine = range(self._rank, each * self._num_ranks, self._num_ranks)
        return DataLoader(
            Subset(self.validation_set, mine),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=as_batch,
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
        refuse_other(state_dict, self.state_dict(), "TextData")

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _num_ranks(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @cached_property
    def _sources(self) -> dict[str, Any]:
        texts = {"train": self.train, "validation": self.validation}
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
                self.text_field,
                self.held_out if setting == "train" else None,
            )
            for setting, sources in self._sources.items()
        }

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

    def _cut_tail(self, path: Path) -> tuple[Windows, Windows]:
        assert self.held_out is not None
        windows = self._cut("train", path)
        aside = max(1, round(self.held_out * len(windows)))
        if aside >= len(windows):
            raise ValueError(
                f"`train` has {len(windows)} windows of `window_tokens` {self.window_tokens}, too "
                f"few to hold out {self.held_out} of them; give `validation` or more text."
            )
        rank_zero_info(
            f"train: too few documents to hold out {self.held_out} of them; the last {aside} "
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


def check_vocabulary(data: TextData, config: PreTrainedConfig) -> None:
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
