"""Puzzles as rows of a table: CSV files, the hub they come from, checks, and generators."""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from thimble import artifacts
from thimble.console import log, progress
from thimble.corpora.sources import debian, upstream
from thimble.errors import ConfigError, DataError
from thimble.puzzles.dataset import in_order

Made = TypeVar("Made")

MAX_BAD_SHARE = 0.01
CHUNK = 8  # puzzles that a worker makes at a time
ADVICE = (
    "Without network, give a folder with train.csv and test.csv with --from FOLDER, or make "
    "puzzles with --generate 1000."
)
PATIENCE = 200  # chunks in a row that may add nothing before a generator gives up


@dataclass(frozen=True)
class Row:
    """A puzzle as text, one character a cell, line by line; ``rating`` grows with difficulty."""

    source: str
    question: str
    answer: str
    rating: float


COLUMNS = {
    "source": ("source",),
    "question": ("question", "q"),
    "answer": ("answer", "a"),
    "rating": ("rating",),
}


def source_files(source: str | Path) -> dict[str, Path]:
    """``train.csv`` and ``test.csv`` of a folder, or of a data set of the hub.

    What names no folder and has the form OWNER/NAME is downloaded into the cache, once. Raises
    DataError where a folder lacks a file, EnvironmentProblem where the hub does not answer.
    """
    folder = Path(source).expanduser()
    names = ("train.csv", "test.csv")
    if folder.is_dir():
        for name in names:
            if not (folder / name).is_file():
                raise DataError(f"{folder} has no {name}. Both train.csv and test.csv are needed.")
    else:
        name = str(source)
        if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
            raise DataError(
                f"There is no folder {source}. Give one with train.csv and test.csv, or a data "
                "set of the hub as OWNER/NAME."
            )
        folder = debian.cache_folder() / "downloads" / name.replace("/", "--")
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        for file in names:
            if not (folder / file).is_file():
                url = f"{hub}/datasets/{name}/resolve/main/{file}"
                upstream.download(url, folder / file, advice=ADVICE)
    return {name.removesuffix(".csv"): folder / name for name in names}


def read_rows(path: Path, alphabet: str, min_difficulty: int | None = None) -> list[Row]:
    """The puzzles of a CSV file with columns source, question (q), answer (a), rating.

    Every question and answer is as long as the first one and made of ``alphabet``; DataError names
    the line and the character where it is not.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = _parse(path, csv.reader(file), frozenset(alphabet), min_difficulty)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV file in UTF-8: {error}.") from error
    if not rows:
        reason = "" if min_difficulty is None else f" with a rating of {min_difficulty} or more"
        raise DataError(f"{path} holds no puzzles{reason}.")
    return rows


def _parse(path: Path, lines: Any, known: frozenset[str], min_difficulty: int | None) -> list[Row]:
    header = [name.strip().lower() for name in next(lines, [])]
    place: dict[str, int] = {}
    for column, names in COLUMNS.items():
        found = [header.index(name) for name in names if name in header]
        if not found:
            raise DataError(
                f"{path} has no column {column}; its first line is: {','.join(header) or 'empty'}."
                "\nIt should be: source,question,answer,rating"
            )
        place[column] = found[0]
    rows: list[Row] = []
    length = 0
    for cells in lines:
        where = f"{path}, line {lines.line_num}"
        if len(cells) != len(header):
            raise DataError(f"{where} has {len(cells)} columns instead of {len(header)}.")
        values = {column: cells[index] for column, index in place.items()}
        length = length or len(values["question"])
        for column in ("question", "answer"):
            value = values[column]
            if len(value) != length or not length:
                raise DataError(
                    f"{where}: the {column} has {len(value)} characters instead of {length}."
                )
            if not known.issuperset(value):
                at = next(i for i, character in enumerate(value) if character not in known)
                raise DataError(
                    f"{where}: character {at + 1} of the {column} is {value[at]!r}; "
                    f"it should be one of {''.join(sorted(known))!r}."
                )
        try:
            rating = float(values["rating"])
        except ValueError:
            raise DataError(f"{where}: the rating {values['rating']!r} is no number.") from None
        if min_difficulty is None or rating >= min_difficulty:
            rows.append(Row(values["source"], values["question"], values["answer"], rating))
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """The same as a file: what was generated can be read again, with its ratings."""
    with artifacts.atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "question", "answer", "rating"])
        writer.writerows([row.source, row.question, row.answer, row.rating] for row in rows)


def sound(
    rows: Sequence[Row],
    check: Callable[[Row], str | None],
    where: str,
    workers: int | None,
    counts: dict[str, Any],
) -> list[Row]:
    """The rows in which ``check`` finds nothing wrong; the others are counted by what it says.

    Raises DataError when more than MAX_BAD_SHARE of them are wrong, naming the first.
    """
    verdicts = each(check, rows, workers)
    wrong = [index for index, verdict in enumerate(verdicts) if verdict]
    if len(wrong) > MAX_BAD_SHARE * len(rows):
        first = wrong[0]
        raise DataError(
            f"{where}: {len(wrong):,} of {len(rows):,} puzzles are not sound, the first "
            f"{verdicts[first]}:\n  {rows[first].question}\nMore than {MAX_BAD_SHARE:.0%} is "
            "refused."
        )
    for verdict in filter(None, verdicts):
        counts[verdict] = counts.get(verdict, 0) + 1
    if wrong:
        log.warning("%s: %d puzzles are not sound and were left out: %s", where, len(wrong), counts)
    return [row for row, verdict in zip(rows, verdicts, strict=True) if not verdict]


def each(function: Callable[[Row], Made], rows: Sequence[Row], workers: int | None) -> list[Made]:
    """``function`` of every row, in several processes where there are many."""
    chunks = [rows[start : start + 500] for start in range(0, len(rows), 500)]
    made = in_order(functools.partial(_each_of, function), chunks, workers)
    return [value for chunk in made for value in chunk]


def _each_of(function: Callable[[Row], Made], rows: Sequence[Row]) -> list[Made]:
    return [function(row) for row in rows]


def subsample(rows: list[Row], size: int | None, seed: int) -> list[Row]:
    """``size`` rows drawn without replacement, in the order of the draw; None: all."""
    if size is not None and size < 1:
        raise ConfigError(f"subsample_size must be at least 1, not {size}.")
    if size is None or size >= len(rows):
        return rows
    draw = np.random.default_rng([seed, len(rows), size])
    return [rows[int(index)] for index in draw.permutation(len(rows))[:size]]


def hold_out(
    rows: list[Row],
    held_out: list[Row],
    sieve: Callable[[Row], Any],
    key: Callable[[Row], Any],
    workers: int | None,
    counts: dict[str, Any],
) -> list[Row]:
    """The training rows that are of no class of the test split; the others are counted.

    ``key`` is the class of a puzzle under symmetry. It may take long, so it is asked for only where
    ``sieve``, a quick value that is equal within a class, is the same on both sides.
    """
    mine, theirs = each(sieve, rows, workers), each(sieve, held_out, workers)
    common = set(mine) & set(theirs)
    suspects = [index for index, value in enumerate(mine) if value in common]
    others = [row for row, value in zip(held_out, theirs, strict=True) if value in common]
    known = set(each(key, others, workers))
    classes = each(key, [rows[index] for index in suspects], workers)
    shared = {index for index, value in zip(suspects, classes, strict=True) if value in known}
    if shared:
        counts["left out of train, since they are in test"] = len(shared)
        log.warning("%d puzzles of train are in test too and were left out.", len(shared))
    if len(shared) == len(rows):
        raise DataError("All puzzles of train.csv are in test.csv as well.")
    return [row for index, row in enumerate(rows) if index not in shared]


def ratings(rows: Sequence[Row]) -> dict[str, Any]:
    return {"rating": spread([row.rating for row in rows])}


def spread(values: Sequence[float]) -> list[float]:
    """Least, median and greatest, for a manifest."""
    ordered = sorted(values)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def generate(
    make: Callable[[int], tuple[Row, bytes]],
    train: int,
    test: int,
    *,
    min_difficulty: int | None,
    workers: int | None,
) -> dict[str, list[Row]]:
    """``train`` and ``test`` different puzzles from ``make(0), make(1), ...``, no class in both.

    ``make`` gives a puzzle and its class under symmetry. A class belongs to the split that had the
    smaller part of its puzzles when the class was first seen; the order is that of the numbers, so
    the result does not depend on ``workers``. Raises ConfigError where there are not so many.
    """
    if train < 1 or test < 1:
        raise ConfigError(f"Both splits need a puzzle: train {train}, test {test}.")
    wanted = {"test": test, "train": train}
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    owner: dict[bytes, str] = {}
    seen: set[str] = set()
    idle = 0
    chunks = (range(start, start + CHUNK) for start in itertools.count(0, CHUNK))
    made = in_order(functools.partial(_make_all, make), chunks, workers)
    with contextlib.closing(made), progress("puzzles", train + test, "puzzles") as advance:
        for chunk in made:
            before = len(seen)
            for row, key in chunk:
                easy = min_difficulty is not None and row.rating < min_difficulty
                if row.question in seen or easy:
                    continue
                split = owner.setdefault(
                    key, min(wanted, key=lambda name: len(rows[name]) / wanted[name])
                )
                if len(rows[split]) < wanted[split]:
                    rows[split].append(row)
                    seen.add(row.question)
                    advance(1)
            if len(seen) == train + test:
                break
            idle = 0 if len(seen) > before else idle + 1
            if idle == PATIENCE:
                raise ConfigError(
                    f"Found {len(rows['train']):,} of {train:,} puzzles for train and "
                    f"{len(rows['test']):,} of {test:,} for test, then none among "
                    f"{PATIENCE * CHUNK:,} more. Ask for fewer, larger or easier ones."
                )
    return rows


def _make_all(make: Callable[[int], tuple[Row, bytes]], numbers: range) -> list[Any]:
    return [make(number) for number in numbers]
