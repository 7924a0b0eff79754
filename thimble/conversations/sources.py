"""The files of a data set: of one we know, fetched from the Hugging Face hub, or a user's own."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thimble.artifacts import read_json
from thimble.corpora import files
from thimble.corpora.sources import hub as hub_access
from thimble.corpora.sources.upstream import download
from thimble.errors import ConfigError, DataError, EnvironmentProblem, nearest

CONVERSATIONS = "conversations.jsonl"  # which `thimble corpus build` writes beside the documents
LINES = (".jsonl", ".ndjson")
ENDINGS = (*(f"{e}{c}" for e in LINES for c in ("", *files.COMPRESSED)), ".parquet")
PAUSE = 2.0  # seconds before the second attempt of a download


@dataclass(frozen=True)
class Hub:
    """A data set of the hub: its repository and its files, each perhaps with .zst added."""

    repository: str
    files: tuple[str, ...]


KNOWN = {
    "slimorca": Hub("Open-Orca/SlimOrca", ("oo-labeled_correct.gpt4.sharegpt.jsonl",)),
    "openorca": Hub(
        "Open-Orca/OpenOrca", ("1M-GPT4-Augmented.parquet", "3_5M-GPT3_5-Augmented.parquet")
    ),
}


def find(name: str, data_dir: str | None = None) -> list[Path]:
    """The files of a data set in order, fetched where they are missing.

    ``name``: a key of ``KNOWN``, a file, a folder, or a corpus of ``data/corpus``. Files of the
    user's own in ``data_dir`` count before those of the hub. Raises DataError when there is
    nothing of that name, EnvironmentProblem when it cannot be fetched.
    """
    short = name.lower().removeprefix("open-orca/")
    known = KNOWN.get(short)
    if known is None and data_dir:
        raise ConfigError(
            f"The folder {data_dir} of data_dir is where {' or '.join(KNOWN)} is; {name} is a path "
            "of its own. Leave one of them out."
        )
    if Path(name).exists() and not data_dir:
        return _inside(Path(name))
    if known is None:
        return _inside(_corpus(name))
    folder = Path(data_dir or f"data/{short}")
    if (folder / CONVERSATIONS).is_file():
        return [folder / CONVERSATIONS]
    here = _readable(folder)
    ours = {f"{file}{ending}" for file in known.files for ending in ("", ".zst")}
    if here and not ours & {path.name for path in here}:
        return here
    missing = [file for file in known.files if not _present(folder, file)]
    if missing:
        _fetch(known, missing, folder)
    return [path for file in known.files if (path := _present(folder, file))]


def stem(paths: list[Path]) -> str:
    """What a set made of these files is called."""
    for name, hub in KNOWN.items():
        if paths[0].name.removesuffix(".zst") in hub.files:
            return name
    if paths[0].name == CONVERSATIONS or len(paths) > 1:
        return paths[0].resolve().parent.name
    return paths[0].name.split(".jsonl")[0].split(".ndjson")[0].removesuffix(".parquet")


def _corpus(name: str) -> Path:
    from thimble.tokens.pipeline import find_corpus

    try:
        return find_corpus(name)
    except (ConfigError, DataError):
        close = nearest(name, KNOWN)
        raise DataError(
            f"There are no conversations {name}: no such file or folder, and known by name are "
            f"{', '.join(KNOWN)}{f' (did you mean {close}?)' if close else ''} and the corpora of "
            "data/corpus."
        ) from None


def _readable(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name.endswith(ENDINGS) and not path.name.startswith(".")
    )


def _inside(path: Path) -> list[Path]:
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise DataError(f"{path} is of another kind; known are {', '.join(ENDINGS)}.")
        return [path]
    if (path / CONVERSATIONS).is_file():
        return [path / CONVERSATIONS]
    if (path / "manifest.json").is_file():
        raise DataError(f"{path} was made without conversations: it has no {CONVERSATIONS}.")
    if not (found := _readable(path)):
        raise DataError(f"{path} holds no conversations: no file ends in {', '.join(ENDINGS)}.")
    return found


def _present(folder: Path, file: str) -> Path | None:
    choices = (folder / file, folder / f"{file}.zst")
    return next((path for path in choices if path.is_file()), None)


# ------------------------------------------------------------------------------- from the hub


def _fetch(hub: Hub, missing: list[str], folder: Path) -> None:
    by_hand = (
        f"Without network, put {' and '.join(missing)} of the data set {hub.repository} into "
        f"{folder} (also as .zst), or name another folder with --data-dir "
        "(in a recipe dataset.data_dir)."
    )
    if hub_access.is_offline():
        raise EnvironmentProblem(
            f"{folder} has no {missing[0]}, and HF_HUB_OFFLINE says not to fetch it. {by_hand}"
        )
    endpoint = hub_access.endpoint()
    answer = folder / ".incomplete-listing.json"
    answer.with_name(f"{answer.name}.part").unlink(missing_ok=True)  # an old one may say otherwise
    listing = download(
        f"{endpoint}/api/datasets/{hub.repository}/tree/main",
        answer,
        pause=PAUSE,
        open_url=hub_access.open_url,
        advice=by_hand,
    )
    try:
        found = {entry["path"]: entry for entry in read_json(listing)}
    except (KeyError, TypeError) as error:
        raise EnvironmentProblem(f"{endpoint} answers with something else than a list.") from error
    finally:
        listing.unlink()
    for file in missing:
        name = next((each for each in (file, f"{file}.zst") if each in found), None)
        if name is None:
            raise EnvironmentProblem(
                f"{hub.repository} at {endpoint} has no file {file} any more. {by_hand}"
            )
        path = folder / name
        download(
            f"{endpoint}/datasets/{hub.repository}/resolve/main/{urllib.parse.quote(name)}",
            path,
            sha256=(found[name].get("lfs") or {}).get("oid"),
            pause=PAUSE,
            open_url=hub_access.open_url,
            advice=by_hand,
        )
        size = found[name].get("size")
        if size is not None and path.stat().st_size != size:
            received = path.stat().st_size
            path.unlink()
            raise DataError(
                f"{file} has {received:,} bytes instead of {size:,}, so it was deleted. Try again."
            )


# ------------------------------------------------------------------------------------ records

Records = list[tuple[int, Any]]  # number of the line or row from 1, and its bytes or its object


def count(path: Path) -> int:
    """How many records a file has, empty lines left out."""
    if path.suffix == ".parquet":
        with _table(path) as opened:
            return opened.metadata.num_rows
    return sum(1 for line in files.lines(path) if line.strip())


def chunks(path: Path, chosen: np.ndarray, size: int = 500) -> Iterator[tuple[int, Records]]:
    """The records of a file, at most ``size`` at a time, and how many were passed on the way.

    ``chosen``: bool [count(path)]; of the others nothing but their number is looked at.
    """
    records: Records = []
    seen = at = 0
    for number, record in _rows(path) if path.suffix == ".parquet" else _lines(path):
        if chosen[at]:
            records.append((number, record))
        at += 1
        if at - seen >= size:
            yield at - seen, records
            records, seen = [], at
    if at > seen:
        yield at - seen, records


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    return ((n, line) for n, line in enumerate(files.lines(path), 1) if line.strip())


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import ArrowException

    with _table(path) as opened:
        number = 0
        batches = opened.iter_batches(500)
        while True:
            try:
                batch = next(batches, None)
            except (OSError, ArrowException) as error:
                raise files.damaged(path, error) from error
            if batch is None:
                return
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _table(path: Path) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise files.damaged(path, error) from error
