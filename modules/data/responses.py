"""Rows of instruction data as tokens, each with a flag that says whether it belongs to a response.

Prompt and response are encoded as one text, and a token belongs to the response if its first
character does: encoded separately, tokens could differ at the boundary.

Legend: B = rows of a batch, T = tokens of the longest row, I = tokens of one row, R = rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from secateur.modules.data.sources import Source, check_characters
from secateur.modules.data.templates import Span, Template
from secateur.modules.data.tokens import TOKENS, array_path, token_type

FLAGS, LENGTHS = "flags", "lengths"
_MULTIPLE = 8
_ROWS_AT_ONCE = 256

Item = tuple[Tensor, Tensor]
"""Token ids (int64) and flags (bool) of a row or a window, both of shape (I,)."""


def array_types(tokenizer: PreTrainedTokenizerBase) -> dict[str, np.dtype[Any]]:
    """Kinds of arrays of a cache entry, and the types of their numbers."""
    types: dict[str, np.dtype[Any]] = {TOKENS: token_type(tokenizer)}
    return types | {FLAGS: np.dtype(bool), LENGTHS: np.dtype("<i8")}


def encoded_rows(
    sources: Sequence[Source], template: Template, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Mapping[str, Sequence[int]]]:
    """Tokens, flags and the length of every row, in order.

    Args:
        sources: The rows.
        template: Makes a text of a row.
        tokenizer: A fast tokenizer, which tells the characters of every token.

    Raises:
        ValueError: A row has no response, or cannot be rendered.
    """
    rows = (_rendered(source, template, tokenizer) for source in sources)
    texts = (row for of_source in rows for row in of_source)
    eos = tokenizer.eos_token_id
    while batch := list(islice(texts, _ROWS_AT_ONCE)):
        found = tokenizer(
            [row.text for row in batch],
            add_special_tokens=template.adds_ends,
            return_offsets_mapping=True,
            verbose=False,
        )
        for ids, offsets, row in zip(
            found["input_ids"], found["offset_mapping"], batch, strict=True
        ):
            flags = [_counts(offset, row.spans) for offset in offsets]
            if template.adds_ends and eos is not None:
                if ids[-1] != eos:  # some tokenizers add it
                    ids, flags = [*ids, eos], [*flags, True]
                flags[-1] = True
            if not any(flags):
                raise row.source.error(f"{row.where} has a response without a token of its own")
            yield {TOKENS: ids, FLAGS: flags, LENGTHS: [len(ids)]}


@dataclass(frozen=True)
class _Row:
    """Text of a row, its responses, and where it was read."""

    text: str
    spans: list[Span]
    source: Source
    where: str


def _rendered(
    source: Source, template: Template, tokenizer: PreTrainedTokenizerBase
) -> Iterator[_Row]:
    for where, row in source.rows():
        try:
            text, spans = template.render(row, tokenizer)
            check_characters(text)
        except ValueError as error:
            raise source.error(f"{where} {error}") from error
        yield _Row(text, spans, source, where)


def _counts(offset: tuple[int, int], spans: Sequence[Span]) -> bool:
    """Test whether a token begins in a response; special tokens that were added have no place."""
    start, end = offset
    return end > start and any(first <= start < last for first, last in spans)


class Packed(Dataset[Item]):
    """Consecutive windows of all rows, joined.

    Args:
        entry: The cache entry.
        split: TRAIN or HELD_OUT.
        window_tokens: Tokens of a window.
        count: Number of windows.
    """

    def __init__(self, entry: Path, split: str, window_tokens: int, count: int) -> None:
        self.entry, self.split = entry, split
        self.window_tokens, self.count = window_tokens, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        at = slice(index * self.window_tokens, (index + 1) * self.window_tokens)
        return _item(self._arrays, at)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process opens the files itself: pickling a memory map would copy all of the data.
        return Packed, (self.entry, self.split, self.window_tokens, self.count)

    @cached_property
    def _arrays(self) -> tuple[Any, Any]:
        return _arrays(self.entry, self.split)


class Padded(Dataset[Item]):
    """Rows one by one, cut at the end; those whose response is cut off entirely are left out.

    Args:
        entry: The cache entry.
        split: TRAIN or HELD_OUT.
        window_tokens: Tokens of a row at most.
        most: Number of rows to use, the first ones; None for all.
    """

    def __init__(
        self, entry: Path, split: str, window_tokens: int, most: int | None = None
    ) -> None:
        self.entry, self.split, self.window_tokens, self.most = entry, split, window_tokens, most
        length_R = np.load(array_path(entry, split, LENGTHS))
        start_R = length_R.cumsum() - length_R
        counted = np.flatnonzero(np.load(array_path(entry, split, FLAGS), mmap_mode="r"))
        # Every row has a response: its first token is the first counted one from its start on.
        first_R = counted[np.searchsorted(counted, start_R)] - start_R
        fits_R = first_R < window_tokens
        self.starts, self.num_rows = start_R[fits_R][:most], len(length_R)
        self.lengths = np.minimum(length_R[fits_R], window_tokens)[:most]
        self.cut_off = int((~fits_R).sum())

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Item:
        start = int(self.starts[index])
        return _item(self._arrays, slice(start, start + int(self.lengths[index])))

    def __reduce__(self) -> tuple[Any, ...]:
        return Padded, (self.entry, self.split, self.window_tokens, self.most)

    @cached_property
    def _arrays(self) -> tuple[Any, Any]:
        return _arrays(self.entry, self.split)


def padded_batch(items: Sequence[Item], padding: int, most: int) -> dict[str, Tensor]:
    """The batch of a module, padded on the right to a multiple of 8 tokens.

    Padding needs no attention mask: no token sees those behind it, and it is not counted.

    Args:
        items: Rows or windows.
        padding: Token id of the padding.
        most: Tokens of a row at most, padding included.

    Returns:
        `input_ids` (B, T), int64; `loss_mask` (B, T), bool: the tokens whose prediction counts;
        `lengths` (B,), int64: tokens without padding.
    """
    lengths_B = torch.tensor([len(ids_I) for ids_I, _ in items])
    longest = min(-(-int(lengths_B.max()) // _MULTIPLE) * _MULTIPLE, most)
    input_BT = torch.full((len(items), longest), padding)
    mask_BT = torch.zeros(len(items), longest, dtype=torch.bool)
    for row, (ids_I, flags_I) in enumerate(items):
        input_BT[row, : len(ids_I)] = ids_I
        mask_BT[row, : len(ids_I)] = flags_I
    return {"input_ids": input_BT, "loss_mask": mask_BT, "lengths": lengths_B}


def _arrays(entry: Path, split: str) -> tuple[Any, Any]:
    ids, flags = (np.load(array_path(entry, split, k), mmap_mode="r") for k in (TOKENS, FLAGS))
    return ids, flags


def _item(arrays: tuple[Any, Any], at: slice) -> Item:
    ids, flags = arrays
    return torch.from_numpy(ids[at].astype(np.int64)), torch.from_numpy(np.array(flags[at]))
