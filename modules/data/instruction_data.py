"""Instruction data: rows of instruction and response, or chats, with the loss on responses only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from secateur.modules.data.loader import joined
from secateur.modules.data.responses import (
    Packed,
    Padded,
    array_types,
    encoded_rows,
    padded_batch,
)
from secateur.modules.data.templates import Alpaca, Template
from secateur.modules.data.token_data import TokenData
from secateur.modules.data.tokens import HELD_OUT, TRAIN, write_entry


class InstructionData(TokenData):
    """Instruction data as batches: `input_ids`, `loss_mask` and `lengths`, see `padded_batch`.

    Only tokens of responses count in losses and perplexities; the end-of-text token after a
    response is one of them. Rows are encoded once, cached on disk and memory-mapped. The order of
    training is a pure function of `seed`, as that of `TextData`, and resumes at any batch.

    Calibration and the report of an export read the same rows as windows of plain text.

    Args:
        train: Rows to train on: files, folders of files, or data sets of the hub, one or a list, in
            the forms of `TextData` that have fields.
        validation: Rows to validate on, in the same forms. If not given, rows of `train` are held
            out.
        template: Makes a text of a row: `Alpaca` (instruction, input, output), or `Chat` (messages,
            by the chat template of the tokenizer).
        packing: Join rows and cut them into windows: no padding, but rows begin and end anywhere,
            and see the rows before them. If false, every row is cut at the end and padded; rows
            whose response is cut off entirely are left out.
        tokenizer: Folder or hub id of the tokenizer; the command line sets the base model's.
        window_tokens: Tokens of a window, and of a row at most, 2 or more.
        batch_size: Rows or windows of a batch on one rank, 1 or more.
        held_out: Fraction of the rows of `train` that is held out if `validation` is not given, in
            (0, 1): every 20th row for 0.05.
        validation_windows: Number of validation rows or windows to use, the first ones, 1 or more;
            all if not given.
        seed: Seed of the training order, 0 or more.
        cache_dir: Folder of the tokens; ~/.cache/secateur/tokens if not given.
        num_workers: Processes that read ahead, 0 or more.
        trust_remote_code: Whether Python files that the tokenizer brings may run.
        weights: Mixture of the entries of `train`, see `TextData`.
        max_tokens: Length of training in tokens, prompts included and padding not, 1 or more,
            instead of `trainer.max_steps`. Rows differ in length: steps are counted by their mean.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        template: Template = Alpaca(),  # noqa: B008 (frozen)
        packing: bool = False,
        tokenizer: str | None = None,
        window_tokens: int = 256,
        batch_size: int = 1,
        held_out: float = 0.05,
        validation_windows: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        num_workers: int = 0,
        trust_remote_code: bool = False,
        weights: list[float] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(
            train=train,
            validation=validation,
            weights=weights,
            tokenizer=tokenizer,
            window_tokens=window_tokens,
            batch_size=batch_size,
            text_field=None,
            held_out=held_out,
            validation_windows=validation_windows,
            max_tokens=max_tokens,
            seed=seed,
            cache_dir=cache_dir,
            num_workers=num_workers,
            trust_remote_code=trust_remote_code,
        )
        self.template, self.packing = template, packing
        self._parts: list[Any] = []
        self._measured: Any = None

    @property
    def form(self) -> str:
        return f"instructions 1 {self.template!r}"

    @property
    def fingerprint(self) -> str:
        """As of `TextData`; packed rows come in another order than padded ones."""
        return f"{super().fingerprint}{' packed' if self.packing else ''}"

    @property
    def tokens_per_window(self) -> float:
        if self.packing:
            return self.window_tokens
        weights = self.weights or [len(part) for part in self._parts]
        means = [float(part.lengths.mean()) for part in self._parts]
        return float(sum(map(mul, weights, means)) / sum(weights))

    def write(self, setting: str, held_out: float | None, entry: Path) -> None:
        """Encode the rows of a setting.

        Raises:
            ValueError: A row has no response or cannot be rendered, or the tokenizer does not tell
                the characters of its tokens.
        """
        tokenizer = self.tokenizer
        if not tokenizer.is_fast:
            raise ValueError(
                "`tokenizer` does not tell which characters a token has, so that responses cannot "
                "be told from prompts; use one with a tokenizer.json."
            )
        self.template.check(tokenizer)
        rows = encoded_rows(self._sources[setting], self.template, tokenizer)
        write_entry(entry, array_types(tokenizer), rows, held_out)

    def cut_batches(self) -> None:
        training = {name: e for name, e in self._entries.items() if name != "validation"}
        self._parts = [self._rows(name, entry, TRAIN) for name, entry in training.items()]
        asides = [(name, entry, HELD_OUT) for name, entry in training.items()]
        if self.validation is not None:
            asides = [("validation", self._entries["validation"], TRAIN)]
        most = self.validation_windows
        share = None if most is None else -(-most // len(asides))
        measured = [self._rows(*aside, share) for aside in asides]
        self._measured = joined(measured)

    @property
    def train_parts(self) -> list[Dataset[Any]]:
        return self._parts

    @property
    def measured(self) -> Dataset[Any]:
        measured: Dataset[Any] = self._measured
        return measured

    @property
    def collate(self) -> Callable[[Any], dict[str, Tensor]]:
        tokenizer = self.tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        padding = next(token for token in ids if token is not None)
        return partial(padded_batch, padding=padding, most=self.window_tokens)

    def lengths_of(self, part: Any) -> Sequence[int] | None:
        return None if self.packing else list(part.lengths)

    def _rows(
        self, setting: str, entry: Path, split: str, most: int | None = None
    ) -> Packed | Padded:
        """The rows of a source that batches are made of.

        Raises:
            ValueError: There are none, or every response is cut off.
        """
        rows = Padded(entry, split, self.window_tokens, most)
        if not rows.num_rows:
            what = f"has too few rows to hold out {self.held_out} of them; give `validation`"
            raise ValueError(f"`{setting}` {what if split == HELD_OUT else 'holds no rows'}.")
        if self.packing:
            windows = len(self._cut(setting, entry / split))
            return Packed(entry, split, self.window_tokens, min(windows, most or windows))
        if not len(rows):
            raise ValueError(
                f"`{setting}`: `window_tokens` {self.window_tokens} cuts off the responses of all "
                f"{rows.num_rows} rows, whose prompts are longer; raise it."
            )
        if rows.cut_off:
            rank_zero_info(
                f"{setting}: {rows.cut_off} of {rows.num_rows} rows are left out, since "
                f"`window_tokens` {self.window_tokens} cuts off all of their responses."
            )
        return rows
