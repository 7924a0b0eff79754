"""The records of a file of the hub, from any place in it: parquet, JSON lines, a list in JSON."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from thimble.corpora.sources.hub import RemoteFile
from thimble.errors import DataError

ROWS = 500  # of parquet, decoded at once
LONGEST = 1 << 26  # characters of one element of a JSON list


def records(
    file: RemoteFile, name: str, columns: list[str], place: int
) -> Iterator[tuple[int, Any]]:
    """The records after ``place``, each with the place after it. DataError for a broken file."""
    if name.endswith(".parquet"):
        return _rows(file, name, columns, place)
    if name.endswith(".json"):
        return _elements(file, name, place)
    return _lines(file, name, place)


def _rows(file: RemoteFile, name: str, columns: list[str], place: int) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, pre_buffer=False) as opened:
            has = opened.schema_arrow.names
            if missing := [column for column in columns if column not in has]:
                raise DataError(
                    f"{name} has no field {', '.join(missing)}; it has "
                    f"{', '.join(has)}. The data set was changed; nothing was made of it."
                )
            first = 0
            for group in range(opened.num_row_groups):
                count = opened.metadata.row_group(group).num_rows
                if first + count > place:
                    batches = opened.iter_batches(
                        ROWS, row_groups=[group], columns=columns, use_threads=False
                    )
                    at = first
                    for batch in batches:
                        if at + len(batch) > place:
                            for row in batch.slice(max(place - at, 0)).to_pylist():
                                place += 1
                                yield place, row
                        at += len(batch)
                first += count
    except pyarrow.ArrowException as error:
        raise DataError(f"{name} cannot be read: {error}") from error


def _lines(file: RemoteFile, name: str, place: int) -> Iterator[tuple[int, Any]]:
    file.seek(place)
    for line in BufferedReader(file, 1 << 20):
        place += len(line)
        if line.strip():
            try:
                yield place, json.loads(line)
            except ValueError as error:
                raise DataError(f"{name} is no JSON before byte {place:,}: {error}") from error


def _elements(file: RemoteFile, name: str, place: int) -> Iterator[tuple[int, Any]]:
    """The elements of one JSON list, without ever holding all of it."""
    file.seek(place)
    reader, decode = BufferedReader(file, 1 << 20), json.JSONDecoder().raw_decode
    characters = codecs.getincrementaldecoder("utf-8")()
    text, at, ended, opened = "", 0, False, place > 0
    while True:
        at = _skip(text, at, "" if not opened else ",")
        if at < len(text):
            if not opened:
                if text[at] != "[":
                    raise DataError(f"{name} is not a JSON list: it begins with {text[at]!r}.")
                place, at, opened = place + len(text[: at + 1].encode()), at + 1, True
                text, at = text[at:], 0
                continue
            if text[at] == "]":
                return
            try:
                value, end = decode(text, at)
            except ValueError as error:
                if ended or len(text) - at > LONGEST:
                    raise DataError(f"{name} is no JSON after byte {place:,}: {error}") from error
            else:
                # A number at the end of what was read may go on; objects have their own end.
                if ended or end < len(text):
                    place += len(text[:end].encode())
                    text, at = text[end:], 0
                    yield place, value
                    continue
        elif ended:
            raise DataError(f"{name} ends before its list does, at byte {file.size:,}.")
        chunk = reader.read(1 << 16)
        ended = not chunk
        try:
            text += characters.decode(chunk, final=ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is not UTF-8 after byte {place:,}: {error.reason}.") from error


def _skip(text: str, at: int, more: str) -> int:
    while at < len(text) and text[at] in " \t\r\n\ufeff" + more:
        at += 1
    return at
