"""Sources of documents, or of rows with fields: files, folders of files, data sets of the hub."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from lightning.pytorch.utilities import rank_zero_info

_SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")
_WRONG = re.compile("[\0\ud800-\udfff]")


class Source(ABC):
    """A source of documents, or of rows with fields."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents in order, one at a time."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows in order, each with its place for errors."""

    @abstractmethod
    def digest(self) -> str:
        """Hash of the content, independent of names and paths."""

    @abstractmethod
    def error(self, what: str) -> ValueError:
        """An error about the content, which names the source."""


@dataclass(frozen=True)
class LocalFile(Source):
    """One file of text.

    Args:
        setting: The setting that named the file, for errors.
        path: A .txt (one document), .json (a list, or lines of objects), .jsonl or .parquet file.
        text_field: Field of objects and column of tables that holds the text; None if rows are
            read.
    """

    setting: str
    path: Path
    text_field: str | None

    def digest(self) -> str:
        with self.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return f"{self.path.suffix.lower()} {content}"

    def documents(self) -> Iterator[str]:
        """The documents in order.

        Raises:
            ValueError: The content does not match the suffix, or lacks the text field.
        """
        if self.path.suffix.lower() == ".txt":
            text = self._decode(self.path.read_bytes(), "the file")
            if wrong := _WRONG.search(text):
                place = text.count("\n", 0, wrong.start()) + 1
                raise self.error(f"line {place} holds {_no_character(wrong)}")
            yield text
        else:
            for where, record in self._records():
                yield self._text(record, where)

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects or rows in order.

        Raises:
            ValueError: The content does not match the suffix, or is none with fields.
        """
        if self.path.suffix.lower() == ".txt":
            raise self.error("plain text has no fields; give objects, such as JSON lines")
        for where, record in self._records():
            if not isinstance(record, dict):
                raise self.error(f"{where} holds {type(record).__name__}, no object with fields")
            yield where, record

    def _records(self) -> Iterator[tuple[str, object]]:
        match self.path.suffix.lower():
            case ".parquet":
                yield from self._table()
            case ".json" if not self._has_lines:
                records = self._parse(self.path.read_bytes(), "the file")
                if not isinstance(records, list):
                    raise self.error("a .json file must hold a list of strings or objects")
                for number, record in enumerate(records):
                    yield f"entry {number}", record
            case _:
                with self.path.open("rb") as file:
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            yield f"line {number}", self._parse(line, f"line {number}")

    @property
    def holds_text(self) -> bool:
        """Test whether a file in a folder holds text, and not objects with other data."""
        return self.path.suffix.lower() != ".json" or self._has_lines or self._begins_with(b"[")

    @property
    def _has_lines(self) -> bool:
        """Test whether the first line is a complete object, as in JSON lines."""
        if not self._begins_with(b"{"):
            return False
        with self.path.open("rb") as file:
            line = next(line for line in file if line.strip())
        try:
            return isinstance(json.loads(line.decode("utf-8-sig")), dict)
        except (ValueError, RecursionError):
            return False

    def _begins_with(self, sign: bytes) -> bool:
        with self.path.open("rb") as file:
            return file.read(1000).removeprefix(codecs.BOM_UTF8).lstrip().startswith(sign)

    def _table(self) -> Iterator[tuple[str, object]]:
        wanted = None if self.text_field is None else [self.text_field]
        try:
            table = pq.ParquetFile(self.path)
            columns = table.schema_arrow.names
            if self.text_field is not None and self.text_field not in columns:
                raise self.error(f"no column {self.text_field!r}; {_choose(columns)}")
            number = 0
            for batch in table.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise self.error(f"not a parquet file, or damaged: {error}") from error

    def _parse(self, content: bytes, where: str) -> Any:
        try:
            return json.loads(self._decode(content, where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise self.error(f"{where} is not JSON: {error}") from error

    def _decode(self, content: bytes, where: str) -> str:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.error(f"{where} is not UTF-8 text: {error}; convert it") from error

    def _text(self, record: object, where: str) -> str:
        if isinstance(record, dict):
            if self.text_field not in record:
                raise self.error(f"{where} has no {self.text_field!r}; {_choose(list(record))}")
            record = record[self.text_field]
        if not isinstance(record, str):
            raise self.error(f"{where} holds {type(record).__name__}, not text")
        if wrong := _WRONG.search(record):
            raise self.error(f"{where} holds {_no_character(wrong)}")
        return record

    def error(self, what: str) -> ValueError:
        return ValueError(f"`{self.setting}`: {self.path}: {what}.")


class Rows(Source):
    """A data set of the library datasets: every row is a document.

    Args:
        setting: The setting that named it, for errors.
        name: Value of the setting.
        text_field: Column that holds the text; None if rows are read.
    """

    def __init__(self, setting: str, name: str, text_field: str | None) -> None:
        self.setting, self.name, self.text_field = setting, name, text_field

    @abstractmethod
    def read(self) -> Any:
        """The data set."""

    def digest(self) -> str:
        content, texts = hashlib.sha256(), self.documents()
        if self.text_field is None:
            texts = (json.dumps(row, sort_keys=True, default=str) for _, row in self.rows())
        for text in texts:
            content.update(f"{len(text)} {text}".encode())
        return f"rows {content.hexdigest()}"

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows in order.

        Raises:
            ValueError: There is no such data set.
        """
        for number, row in enumerate(self.read()):
            yield f"row {number}", row

    def error(self, what: str) -> ValueError:
        return ValueError(f"`{self.setting}`: {self.name}: {what}.")

    def documents(self) -> Iterator[str]:
        """The rows in order.

        Raises:
            ValueError: There is no such data set, or it lacks the text column.
        """
        rows = self.read()
        if self.text_field not in rows.column_names:
            raise ValueError(
                f"`{self.setting}`: {self.name} has no column {self.text_field!r}; "
                f"{_choose(rows.column_names)}."
            )
        for number, row in enumerate(rows.select_columns([self.text_field])):
            text = row[self.text_field]
            is_text = isinstance(text, str)
            wrong = _WRONG.search(text) if is_text else None
            if wrong or not is_text:
                what = _no_character(wrong) if wrong else f"{type(text).__name__}, not text"
                raise ValueError(
                    f"`{self.setting}`: row {number} of column {self.text_field!r} of {self.name} "
                    f"holds {what}; leave it out, or choose another `text_field`."
                )
            yield text


class HubData(Rows):
    """A data set of the hub: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; the split is `train` if not
    given.
    """

    def read(self) -> Any:
        name, config, split = (*self.name.split(":", 2), "", "")[:3]
        try:
            return datasets.load_dataset(name, config or None, split=split or "train")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`{self.setting}` {self.name!r} is neither a local file or folder nor a data set "
                f"of the hub: {error}"
            ) from error


class SavedData(Rows):
    """A folder that `save_to_disk` of the library datasets has written; if it has splits, `train`
    is used.
    """

    MARKS = ("dataset_dict.json", "state.json")

    def read(self) -> Any:
        try:
            found: Any = datasets.load_from_disk(self.name)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise ValueError(
                f"`{self.setting}`: {self.name} is a data set on disk that cannot be read: {error}"
            ) from error
        if not isinstance(found, dict):
            return found
        if "train" not in found:
            folders = ", ".join(str(Path(self.name) / split) for split in found)
            raise ValueError(
                f"`{self.setting}`: {self.name} has no split `train`; give one of {folders}."
            )
        return found["train"]


def check_characters(text: str) -> None:
    """Check that a text can be encoded.

    Raises:
        ValueError: It cannot; the message has no subject.
    """
    if wrong := _WRONG.search(text):
        raise ValueError(f"holds {_no_character(wrong)}")


def find_sources(setting: str, names: str | Sequence[str], text_field: str | None) -> list[Source]:
    """The sources that a setting names: files, folders (searched in order of path), hub data.

    Raises:
        ValueError: A file is missing or of an unknown kind, or a folder holds no text.
    """
    sources: list[Source] = []
    for name in [names] if isinstance(names, str) else names:
        if not name:
            raise ValueError(f"`{setting}` has an empty name; give a file, folder or data set.")
        path = Path(expanduser(name))
        if path.is_dir() and any((path / mark).is_file() for mark in SavedData.MARKS):
            sources.append(SavedData(setting, str(path), text_field))
        elif path.is_dir():
            sources += _in_folder(setting, path, text_field)
        elif path.suffix.lower() in _SUFFIXES or path.exists() or path.is_absolute():
            if not path.is_file():
                raise ValueError(f"`{setting}`: there is no file {path}; check the path.")
            if path.suffix.lower() not in _SUFFIXES:
                raise ValueError(
                    f"`{setting}`: {path} has an unknown suffix; give {', '.join(_SUFFIXES)}."
                )
            sources.append(LocalFile(setting, path, text_field))
        else:
            sources.append(HubData(setting, name, text_field))
    if not sources:
        raise ValueError(f"`{setting}` names no data; give at least one file or data set.")
    return sources


def _in_folder(setting: str, folder: Path, text_field: str | None) -> list[LocalFile]:
    """The text files below a folder, in order of path; log which these are.

    Raises:
        ValueError: There are none, or a link leads nowhere.
    """
    found = sorted(folder.rglob("*"))
    if lost := [path for path in found if path.is_symlink() and not path.exists()]:
        raise ValueError(
            f"`{setting}`: {lost[0]} is a link that leads nowhere; mend or remove it, or name the "
            "files to read."
        )
    inside = [path.relative_to(folder) for path in found if path.is_file()]
    seen = [path for path in inside if not any(part.startswith(".") for part in path.parts)]
    known = [path for path in seen if path.suffix.lower() in _SUFFIXES]
    files = [LocalFile(setting, folder / path, text_field) for path in known]
    taken = [file for file in files if file.holds_text]
    if not taken:
        raise ValueError(f"`{setting}`: folder {folder} holds no file of {', '.join(_SUFFIXES)}.")
    names = [str(file.path.relative_to(folder)) for file in taken]
    left = [str(path) for path in inside if str(path) not in names]
    rank_zero_info(
        f"{setting}: {len(names)} files of {folder}: {_listed(names)}"
        f"{f'; not {_listed(left)}' if left else ''}."
    )
    return taken


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _no_character(found: re.Match[str]) -> str:
    """Describe an invalid character of a text that cannot be encoded."""
    if found[0] == "\0":
        return "a zero character and is not text"
    return f"half of a character, {found[0]!r}, which cannot be encoded"


def _choose(fields: Sequence[str]) -> str:
    if chats := [name for name in fields if name in ("messages", "conversations")]:
        return f"it has {chats[0]!r}: chats are read by InstructionData, with `template` Chat"
    return f"set `text_field` to one of {', '.join(map(repr, fields))}"
