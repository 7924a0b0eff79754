"""``thimble data download``: a plan's data sets from the hub, as JSONL, one file each.

hub file -> records -> text -> <output>/<category>/<name>.jsonl

What is being written has a hidden name beside it until it is whole. ``.download.json`` says of each
data set its commit and how far it is: the hub's file and the place in it, and how many bytes had
been written then. Going on means cutting the file to these and reading from that place, so nothing
comes twice and nothing is left out, however the last run ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from thimble import artifacts
from thimble.console import log, progress
from thimble.corpora.local import REFUSED_SHARE
from thimble.corpora.plans import CATEGORIES, CONVERTED, PLANS, SOURCES, Source
from thimble.corpora.sources import hub
from thimble.corpora.sources.streams import records
from thimble.errors import (
    ConfigError,
    DataError,
    EnvironmentProblem,
    ThimbleError,
    disk_problem,
    nearest,
)

LEDGER = ".download.json"  # hidden, so that a folder of data sets has nothing but these
MIN_CHARACTERS = 50  # of a sample; shorter ones are left out, and counted
SAVE_SECONDS = 2.0
TOGETHER = 500  # samples written at once
OFFLINE = (
    "Without network, put JSONL files with a `text` into {output} and go on with "
    "`thimble tokens pack`."
)


@dataclass
class Progress:
    """How far a data set is, as ``.download.json`` keeps it."""

    spec: str = ""
    commit: str = ""
    hub_licence: str | None = None
    gated: bool = False
    files: list[str] = field(default_factory=list)
    hub_bytes: int | None = None
    file: int = 0  # of ``files``, and the place in it: a row of parquet, else a byte
    place: int = 0
    bytes: int = 0  # written so far
    seen: int = 0
    written: int = 0
    empty: int = 0
    short: int = 0
    refused: int = 0
    complete: bool = False
    sha256: str | None = None
    problem: str | None = None

    @property
    def exhausted(self) -> bool:
        return bool(self.files) and self.file >= len(self.files)


@dataclass(frozen=True)
class Downloads:
    """The data sets of a plan: licence, size and state of each."""

    plan: str
    output: Path
    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return {"plan": self.plan, "output": str(self.output), "data_sets": self.rows}

    def render(self, console: Any) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in ("data set", "of the hub", "licence"):
            table.add_column(name, overflow="fold")
        for name in ("on the hub", "samples", "at most"):
            table.add_column(name, justify="right")
        table.add_column("state", overflow="fold")
        for row in self.rows:
            licence, hubs = row["licence"], row["hub_licence"]
            table.add_row(
                f"{row['category']}/{row['name']}",
                row["repository"],
                licence if hubs in (None, licence) else f"{licence} (hub: {hubs})",
                "" if row["hub_bytes"] is None else size(row["hub_bytes"]),
                f"{row['samples']:,}",
                f"{row['cap']:,}",
                row["state"],
            )
        console.print(table)
        console.print(f"{self.output}: {sum(row['samples'] for row in self.rows):,} samples")


def size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def download(
    plan: str,
    categories: Sequence[str] = (),
    output: str | Path = "data/distillation",
    *,
    dry_run: bool = False,
    status: bool = False,
) -> Downloads:
    """Fetch the data sets of ``plan`` (of some ``categories``) that are not there yet.

    ``status`` only says what is there; ``dry_run`` asks the hub as well for sizes and licences.
    Data sets that fail do not keep the others back. Raises ConfigError for names that do not exist;
    at the end DataError where fields do not match, EnvironmentProblem for what was refused or did
    not answer.
    """
    caps = _chosen(plan, categories)
    output = Path(output)
    ledger = _read_ledger(output)
    if status or dry_run:
        for name in caps if dry_run and not hub.is_offline() else ():
            _ask(ledger, name, output)
        return _table(plan, caps, ledger, output)
    todo = [
        name
        for name, cap in caps.items()
        if not SOURCES[name].gone and not _is_done(ledger.get(name), name, cap, output)
    ]
    if todo and hub.is_offline():
        raise EnvironmentProblem(
            f"{todo[0]} has to be fetched, and HF_HUB_OFFLINE says not to. "
            f"{OFFLINE.format(output=output)}"
        )
    failed: list[ThimbleError] = []
    with artifacts.locked(output, "the data sets in") if todo else contextlib.nullcontext():
        for name in todo:
            try:
                _fetch(name, caps[name], ledger, output)
            except KeyboardInterrupt:
                log.warning("interrupted in %s: the same command goes on from here", name)
                raise
            except (DataError, hub.Refused) as error:
                log.warning("%s: %s", name, error)
                failed.append(error)
                ledger = _read_ledger(output)  # ours counts samples that were never written
                if isinstance(error, DataError):  # what it was read as so far is of no use
                    _part(_path(name, output)).unlink(missing_ok=True)
                    ledger[name] = Progress()
                ledger.setdefault(name, Progress()).problem = str(error)
                _write_ledger(output, ledger)
    for name in caps:
        if SOURCES[name].gone:
            log.warning("%s is left out: %s", SOURCES[name].repository, SOURCES[name].gone)
    if failed:
        others = f" {len(failed)} of {len(todo)} data sets failed." if len(failed) > 1 else ""
        raise type(failed[0])(f"{failed[0]}{others} The others are in {output}.")
    return _table(plan, caps, ledger, output)


def _chosen(plan: str, categories: Sequence[str]) -> dict[str, int]:
    if plan not in PLANS:
        close = nearest(plan, PLANS)
        raise ConfigError(
            f"There is no plan {plan}; there are {', '.join(PLANS)}."
            f"{f' Did you mean {close}?' if close else ''}"
        )
    for category in categories:
        if category not in CATEGORIES:
            close = nearest(category, CATEGORIES)
            raise ConfigError(
                f"There is no category {category}; there are {', '.join(CATEGORIES)}."
                f"{f' Did you mean {close}?' if close else ''}"
            )
    caps = PLANS[plan].caps
    chosen = {
        n: cap for n, cap in caps.items() if SOURCES[n].category in (categories or CATEGORIES)
    }
    if not chosen:
        raise ConfigError(f"The plan {plan} has nothing of {', '.join(categories)}.")
    return chosen


# --------------------------------------------------------------------------------- how far it is


def _read_ledger(output: Path) -> dict[str, Progress]:
    if not (output / LEDGER).is_file():
        return {}
    try:
        return {n: Progress(**facts) for n, facts in artifacts.read_json(output / LEDGER).items()}
    except (AttributeError, TypeError) as error:
        raise DataError(
            f"{output / LEDGER} is not what this version writes ({error}). Move {output} away, or "
            "name another folder."
        ) from error


def _write_ledger(output: Path, ledger: dict[str, Progress]) -> None:
    artifacts.write_json(output / LEDGER, {name: asdict(entry) for name, entry in ledger.items()})


def _path(name: str, output: Path) -> Path:
    return output / SOURCES[name].category / f"{name}.jsonl"


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")  # hidden: whoever reads the folder passes it over


def _spec(source: Source) -> str:
    return artifacts.fingerprint(asdict(source))


def _is_done(entry: Progress | None, name: str, cap: int, output: Path) -> bool:
    path = _path(name, output)
    return (
        entry is not None
        and entry.complete
        and entry.spec == _spec(SOURCES[name])
        and (entry.exhausted or entry.written >= cap)
        and path.is_file()
        and path.stat().st_size == entry.bytes
    )


def _table(plan: str, caps: dict[str, int], ledger: dict[str, Progress], output: Path) -> Downloads:
    rows = []
    for name, cap in caps.items():
        source, entry = SOURCES[name], ledger.get(name, Progress())
        if source.gone:
            state = f"cannot be had: {source.gone}"
        elif _is_done(entry, name, cap, output):
            state = "complete"
        elif entry.problem:
            state = f"failed: {entry.problem}"
        elif entry.written:
            state = "begun" if entry.spec == _spec(source) else "out of date"
        else:
            state = "not here"
            if entry.gated:
                state += "; accept its terms on its page, and set HF_TOKEN"
        rows.append(
            {
                "name": name,
                "category": source.category,
                "repository": source.repository,
                "licence": source.licence,
                "hub_licence": entry.hub_licence,
                "hub_bytes": entry.hub_bytes,
                "cap": cap,
                "samples": entry.written,
                "left_out": {
                    "empty": entry.empty,
                    "short": entry.short,
                    "refused": entry.refused,
                },
                "state": state,
                "path": str(_path(name, output)),
            }
        )
    return Downloads(plan, output, rows)


# ------------------------------------------------------------------------------------- from the hub


def _ask(ledger: dict[str, Progress], name: str, output: Path) -> None:
    """Sizes and licence for the table; what fails becomes the data set's state."""
    if SOURCES[name].gone or name in ledger:
        return
    try:
        ledger[name] = _begin(name, output)[0]
    except (DataError, hub.Refused) as error:
        ledger[name] = Progress(problem=str(error))


def _begin(name: str, output: Path) -> tuple[Progress, hub.Snapshot]:
    """A data set's files as they are today."""
    source = SOURCES[name]
    tried = [("main", source.files)]
    if source.converted:
        tried.append((CONVERTED, source.converted))
    has: list[str] = []
    for revision, pattern in tried:
        found = hub.snapshot(source.repository, revision, advice=OFFLINE.format(output=output))
        files = found.matching(pattern)
        if files:
            entry = Progress(_spec(source), found.commit, found.licence, found.gated, list(files))
            entry.hub_bytes = sum(files.values())
            return entry, found
        has += list(found.files)
    raise DataError(
        f"{source.repository} has no file {' or '.join(p for _, p in tried)} any more; it has "
        f"{', '.join(has[:8]) or 'nothing'}{' and others' if len(has) > 8 else ''}."
    )


def _resume(entry: Progress | None, name: str, output: Path) -> tuple[Progress, hub.Snapshot]:
    """Where to go on, with the file cut to what it had there; from the start where there is
    nothing to go on with."""
    path, part = _path(name, output), _part(_path(name, output))
    path.parent.mkdir(parents=True, exist_ok=True)
    if entry and entry.commit and entry.spec == _spec(SOURCES[name]):
        if not part.is_file() and path.is_file() and path.stat().st_size == entry.bytes:
            os.replace(path, part)  # the cap was lower then, or the last word was not written
        if part.is_file() and part.stat().st_size >= entry.bytes:
            os.truncate(part, entry.bytes)
            entry.complete, entry.problem = False, None
            found = hub.snapshot(
                SOURCES[name].repository, entry.commit, advice=OFFLINE.format(output=output)
            )
            missing = [file for file in entry.files if file not in found.files]
            if not missing:
                if entry.written:
                    log.info("%s: going on after %s samples", name, f"{entry.written:,}")
                return entry, found
    part.write_bytes(b"")
    return _begin(name, output)


def _fetch(name: str, cap: int, ledger: dict[str, Progress], output: Path) -> None:
    source, path = SOURCES[name], _path(name, output)
    entry, found = _resume(ledger.get(name), name, output)
    ledger[name] = entry
    if found.licence and found.licence != source.licence:
        log.warning(
            "%s: the plan names the licence %s, the hub %s; the hub's counts",
            source.repository,
            source.licence,
            found.licence,
        )
    try:
        with open(_part(path), "ab") as out, progress(name, cap, "samples") as advance:
            advance(entry.written)
            _write_samples(name, cap, ledger, output, found, out, advance)
    except OSError as error:
        raise disk_problem(error, path) from error
    if not entry.written:
        raise DataError(
            f"{source.repository} gave no sample: of {entry.seen:,} records {entry.empty:,} have "
            f"an empty field of {', '.join(source.columns)} and {entry.short:,} are shorter than "
            f"{MIN_CHARACTERS} characters."
        )
    entry.sha256 = artifacts.sha256_file(_part(path))
    os.replace(_part(path), path)
    artifacts.fsync(path.parent)
    entry.complete = True
    _write_ledger(output, ledger)


def _write_samples(
    name: str,
    cap: int,
    ledger: dict[str, Progress],
    output: Path,
    found: hub.Snapshot,
    out: Any,
    advance: Any,
) -> None:
    """Append samples to ``out`` until the cap or the end; the ledger follows, never ahead."""
    source, entry = SOURCES[name], ledger[name]
    lines: list[bytes] = []
    saved, first_refusal = time.monotonic(), ""

    def flush(*, save: bool) -> None:
        nonlocal saved
        out.write(b"".join(lines))
        entry.bytes += sum(len(line) for line in lines)
        lines.clear()
        if entry.refused > REFUSED_SHARE * entry.seen:
            raise DataError(
                f"{source.repository}: {entry.refused:,} of {entry.seen:,} records do not have "
                f"the fields that are expected, the first: {first_refusal}. The data set was "
                "changed; nothing was made of it."
            )
        if save or time.monotonic() - saved >= SAVE_SECONDS:
            out.flush()
            os.fsync(out.fileno())
            _write_ledger(output, ledger)
            saved = time.monotonic()

    while entry.file < len(entry.files) and entry.written < cap:
        file = entry.files[entry.file]
        for place, record in records(found.open(file), file, source.columns, entry.place):
            entry.place = place
            entry.seen += 1
            try:
                text = source.text(record)
                sample = {
                    "id": f"{name}-{entry.seen}",
                    "text": text,
                    "source": source.repository,
                    "category": source.category,
                    "license": found.licence or source.licence,
                }
                line = f"{json.dumps(sample, ensure_ascii=False)}\n".encode()
            except ValueError as error:  # a Mismatch, or half of a character
                entry.refused += 1
                first_refusal = first_refusal or f"{file}: {error}"
            else:
                if len(text) >= MIN_CHARACTERS:
                    lines.append(line)
                    entry.written += 1
                    advance(1)
                else:
                    entry.short += bool(text)
                    entry.empty += not text
            if entry.written >= cap:
                break
            if len(lines) >= TOGETHER or entry.refused:
                flush(save=False)
        else:
            entry.file, entry.place = entry.file + 1, 0
        flush(save=True)
