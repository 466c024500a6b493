"""Where documents come from: files, folders of files, data sets of the hub."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

_SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")


class Source(ABC):
    """Where documents come from."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents in order, one at a time."""

    @abstractmethod
    def digest(self) -> str:
        """Hash of the content, whatever it is called and wherever it lies."""


@dataclass(frozen=True)
class LocalFile(Source):
    """One file of text.

    Args:
        setting: The setting that named the file, for errors.
        path: A .txt (one document), .json (a list), .jsonl or .parquet file.
        text_field: Field of objects and column of tables that holds the text.
    """

    setting: str
    path: Path
    text_field: str

    def digest(self) -> str:
        with self.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return f"{self.path.suffix.lower()} {content}"

    def documents(self) -> Iterator[str]:
        """The documents in order.

        Raises:
            ValueError: The content is not what the suffix promises, or lacks the text field.
        """
        match self.path.suffix.lower():
            case ".txt":
                yield self._decode(self.path.read_bytes(), "the file")
            case ".parquet":
                yield from self._rows()
            case ".jsonl":
                with self.path.open("rb") as file:
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            where = f"line {number}"
                            yield self._text(self._parse(line, where), where)
            case _:
                records = self._parse(self.path.read_bytes(), "the file")
                if not isinstance(records, list):
                    raise self._error("a .json file must hold a list of strings or objects")
                for number, record in enumerate(records):
                    yield self._text(record, f"entry {number}")

    def _rows(self) -> Iterator[str]:
        try:
            table = pq.ParquetFile(self.path)
        except pa.ArrowInvalid as error:
            raise self._error(f"not a parquet file: {error}") from error
        columns = table.schema_arrow.names
        if self.text_field not in columns:
            raise self._error(f"no column {self.text_field!r}; {_choose(columns)}")
        for batch in table.iter_batches(columns=[self.text_field]):
            for number, text in enumerate(batch.column(0).to_pylist()):
                yield self._text(text, f"row {number} of a batch")

    def _parse(self, content: bytes, where: str) -> Any:
        try:
            return json.loads(self._decode(content, where))
        except json.JSONDecodeError as error:
            raise self._error(f"{where} is not JSON: {error}") from error

    def _decode(self, content: bytes, where: str) -> str:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._error(f"{where} is not UTF-8 text: {error}; convert it") from error
        if "\0" in text:
            raise self._error(f"{where} holds zero bytes and is not text")
        return text

    def _text(self, record: object, where: str) -> str:
        if isinstance(record, dict):
            if self.text_field not in record:
                raise self._error(f"{where} has no {self.text_field!r}; {_choose(list(record))}")
            record = record[self.text_field]
        if not isinstance(record, str):
            raise self._error(f"{where} holds {type(record).__name__}, not text")
        return record

    def _error(self, what: str) -> ValueError:
        return ValueError(f"`{self.setting}`: {self.path}: {what}.")


@dataclass(frozen=True)
class HubData(Source):
    """A data set of the hub: every row is a document.

    Args:
        setting: The setting that named it, for errors.
        name: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; the split is `train` if not given.
        text_field: Column that holds the text.
    """

    setting: str
    name: str
    text_field: str

    def digest(self) -> str:
        content = hashlib.sha256()
        for text in self.documents():
            content.update(f"{len(text)} {text}".encode())
        return f"rows {content.hexdigest()}"

    def documents(self) -> Iterator[str]:
        """The rows in order.

        Raises:
            ValueError: The hub does not give the data set, or it lacks the text column.
        """
        name, config, split = (*self.name.split(":", 2), "", "")[:3]
        try:
            rows: Any = datasets.load_dataset(name, config or None, split=split or "train")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`{self.setting}` {self.name!r} is neither a file or folder here nor a data set "
                f"that the hub gives: {error}"
            ) from error
        if self.text_field not in rows.column_names:
            raise ValueError(
                f"`{self.setting}`: {self.name} has no column {self.text_field!r}; "
                f"{_choose(rows.column_names)}."
            )
        for row in rows.select_columns([self.text_field]):
            if not isinstance(text := row[self.text_field], str):
                raise ValueError(
                    f"`{self.setting}`: column {self.text_field!r} of {self.name} holds "
                    f"{type(text).__name__}, not text; choose another `text_field`."
                )
            yield text


def find_sources(setting: str, names: str | Sequence[str], text_field: str) -> list[Source]:
    """The sources that a setting names: files, folders (searched in order of path), hub data.

    Raises:
        ValueError: A file is missing or of an unknown kind, or a folder holds no text.
    """
    sources: list[Source] = []
    for name in [names] if isinstance(names, str) else names:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
            if not files:
                raise ValueError(
                    f"`{setting}`: folder {path} holds no file of {', '.join(_SUFFIXES)}."
                )
            sources += [LocalFile(setting, file, text_field) for file in files]
        elif path.suffix.lower() in _SUFFIXES or path.exists() or path.is_absolute():
            if not path.is_file():
                raise ValueError(f"`{setting}`: there is no file {path}; check the path.")
            if path.suffix.lower() not in _SUFFIXES:
                raise ValueError(
                    f"`{setting}`: {path} is of no known kind; give {', '.join(_SUFFIXES)}."
                )
            sources.append(LocalFile(setting, path, text_field))
        else:
            sources.append(HubData(setting, name, text_field))
    if not sources:
        raise ValueError(f"`{setting}` names no data; give at least one file or data set.")
    return sources


def _choose(fields: Sequence[str]) -> str:
    return f"set `text_field` to one of {', '.join(map(repr, fields))}"
