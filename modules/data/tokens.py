"""Token arrays of documents, written to disk once and memory-mapped from then on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from secateur.modules.data.sources import Source
from secateur.pruning.checksums import damaged_files, write_sums
from secateur.pruning.progress import tracked

TRAIN, HELD_OUT = "train.npy", "held_out.npy"
TOKENS = "tokens"
_FORMAT = "secateur-tokens-2"
_PLACE = ("_name_or_path", "is_local", "local_files_only", "name_or_path")
"""Keys of a tokenizer's configuration that depend on the path that it was loaded from."""
_DOCUMENTS_AT_ONCE = 256  # enough for the threads of a fast tokenizer, little memory


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that affects how a tokenizer encodes, hex, 64 digits."""
    content = hashlib.sha256(repr(_ends(tokenizer)).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.name == "tokenizer_config.json":
                settings = json.loads(path.read_text(encoding="utf-8"))
                decides = {key: value for key, value in settings.items() if key not in _PLACE}
                content.update(json.dumps(decides, sort_keys=True).encode())
            elif path.is_file():
                content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()


def cache_key(sources: Sequence[Source], tokenizer: str, form: str, held_out: float | None) -> str:
    """Name of the cache entry, hex, 64 digits: another content or setting gives another name.

    Args:
        sources: The documents.
        tokenizer: Fingerprint of the tokenizer.
        form: How a document is read: the field that holds the text, or the template of a row.
        held_out: Fraction of the documents to write to a separate array, in (0, 1), or None.
    """
    facts = [_FORMAT, tokenizer, form, held_out, [source.digest() for source in sources]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def tokenise(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    held_out: float | None,
    entry: Path,
) -> None:
    """Write the tokens of all documents, in order, unless the cache has them already.

    The entry is a folder of one-dimensional .npy arrays: `train.npy`, and `held_out.npy` with every
    1 / held_out-th document. It appears complete or not at all, even if several processes write it.

    Args:
        sources: The documents.
        tokenizer: Encodes them with its usual special tokens.
        held_out: Fraction of the documents to hold out, in (0, 1), or None.
        entry: Folder to write.

    Raises:
        ValueError: The cache has a damaged entry, or cannot be created.
    """

    def documents() -> Iterator[Mapping[str, Sequence[int]]]:
        for ids in _encoded(sources, tokenizer):
            yield {TOKENS: ids}

    write_entry(entry, {TOKENS: token_type(tokenizer)}, documents(), held_out)


def token_type(tokenizer: PreTrainedTokenizerBase) -> np.dtype[Any]:
    """The type of token ids on disk: two bytes if they suffice."""
    return np.dtype("<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<u4")


def array_path(entry: Path, split: str, kind: str) -> Path:
    """File of an array of a cache entry.

    Args:
        entry: The folder.
        split: TRAIN or HELD_OUT.
        kind: What the array holds, such as TOKENS.
    """
    return entry / (split if kind == TOKENS else split.replace(".npy", f".{kind}.npy"))


def write_entry(
    entry: Path,
    types: Mapping[str, np.dtype[Any]],
    documents: Iterator[Mapping[str, Sequence[int]]],
    held_out: float | None,
) -> None:
    """Write a cache entry, unless it is there already.

    Args:
        entry: Folder to write.
        types: Kinds of arrays, see `array_path`, and the types of their numbers.
        documents: The documents in order: what each adds to the array of every kind.
        held_out: Fraction of the documents to hold out, in (0, 1), or None.

    Raises:
        ValueError: The cache has a damaged entry, or cannot be created.
    """
    places = [(split, kind) for split in (TRAIN, HELD_OUT) for kind in types]
    names = [array_path(entry, *place).name for place in places]
    if entry.is_dir():
        if damaged := damaged_files(entry, names):
            raise ValueError(
                f"`cache_dir`: {entry / damaged[0]} is damaged. Delete {entry}; the text is then "
                "tokenised again."
            )
        return
    rank_zero_info(f"Tokenising into {entry} ...")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`cache_dir` {entry.parent} cannot be made: {error.strerror}.") from error
    with tempfile.TemporaryDirectory(prefix=".making-", dir=entry.parent) as scratch:
        made = Path(scratch) / "entry"
        made.mkdir()
        with ExitStack() as files:
            arrays = {
                (split, kind): _GrowingArray(
                    files.enter_context(array_path(made, split, kind).open("wb")), types[kind]
                )
                for split, kind in places
            }
            for number, found in enumerate(tracked(documents, "Tokenising documents")):
                share = held_out or 0.0
                aside = int((number + 1) * share) > int(number * share)
                for kind, values in found.items():
                    arrays[HELD_OUT if aside else TRAIN, kind].append(values)
            for array in arrays.values():
                array.finish()
        write_sums(made, names)
        try:
            made.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another process was faster, with the same content
                raise


class _GrowingArray:
    """A one-dimensional .npy file whose length is not known in advance."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self.file, self.dtype, self.length = file, dtype, 0
        self._write_header()

    def append(self, values: Sequence[int]) -> None:
        self.file.write(np.asarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def finish(self) -> None:
        """Write the length into the space that numpy reserves in the header."""
        self.file.seek(0)
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)


def _encoded(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of every document that has text, with BOS and EOS."""
    starts, ends = _ends(tokenizer)
    closing = [tokenizer.eos_token_id] if not (starts or ends) else []
    if closing == [None]:
        rank_zero_info("The tokenizer has neither BOS nor EOS: documents are joined directly.")
        closing = []
    documents = (text for source in sources for text in source.documents() if text)
    while texts := list(islice(documents, _DOCUMENTS_AT_ONCE)):
        # verbose=False: a document may be longer than the model's window, it is cut later.
        for ids in tokenizer(texts, verbose=False)["input_ids"]:
            yield ids + closing


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Test whether the tokenizer itself adds BOS before a text, and EOS after it."""
    ids = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return bos is not None and ids[0] == bos, eos is not None and ids[-1] == eos
