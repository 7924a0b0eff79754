"""A user's own text: .txt, .md, .jsonl and .parquet files, also compressed, and folders of them."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thimble.console import log
from thimble.corpora import files
from thimble.corpora.extract import Text
from thimble.corpora.questions import Question
from thimble.corpora.recipe import QA
from thimble.errors import DataError

PLAIN = (".txt", ".md", ".text", ".rst", ".markdown")
RECORDS = (".jsonl", ".ndjson")
ENDINGS = (*PLAIN, *RECORDS, ".parquet")
# A text file is a book rather than a document: it is cut into parts of this size, each a document
# of its own, so that even a single file can be divided into training and held-out text.
PART_CHARACTERS = 4_000
TEXT_KEYS = ("text", "content")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
REFUSED_SHARE = 0.01
REFUSED = "records_refused"


@dataclass(frozen=True)
class UserFile:
    """A file of the user's: where it is, and what it is called in the corpus."""

    path: str
    name: str

    @property
    def ending(self) -> str:
        name = self.name.lower()
        for compressed in files.COMPRESSED:
            name = name.removesuffix(compressed)
        return Path(name).suffix


def find(sources: Sequence[str | Path]) -> list[UserFile]:
    """The files that ``sources`` name, folders searched whole; sorted by name.

    Raises DataError for a path that does not exist, a file of another kind, and a folder without
    any file that can be read.
    """
    found: dict[str, UserFile] = {}
    passed: Counter[str] = Counter()
    for source in map(Path, sources):
        if not source.exists():
            raise DataError(f"{source} does not exist.")
        inside = [source] if source.is_file() else sorted(source.rglob("*"))
        for path in inside:
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
            if not path.is_file() or hidden:
                continue
            name = path.name if source.is_file() else path.relative_to(source.parent).as_posix()
            file = UserFile(str(path.resolve()), name)
            if file.ending in ENDINGS:
                found.setdefault(file.path, file)
            else:
                passed[path.suffix or path.name] += 1
    if passed:
        kinds = ", ".join(f"{ending} ({count})" for ending, count in passed.most_common(5))
        log.warning("%d files of other kinds are left out: %s.", passed.total(), kinds)
    if not found:
        raise DataError(
            f"Nothing to read in {', '.join(map(str, sources))}. "
            f"Known kinds are {', '.join(ENDINGS)}, each also as .gz, .zst or .xz."
        )
    names = Counter(file.name for file in found.values())
    # Two files of one name from different folders keep their whole paths.
    return sorted(
        (UserFile(f.path, f.path if names[f.name] > 1 else f.name) for f in found.values()),
        key=lambda file: file.name,
    )


def stem(source: str | Path) -> str:
    """What a corpus made of ``source`` is called: its name without the endings we know."""
    path = Path(source).resolve()
    if path.is_dir():
        return path.name
    name = path.name
    for ending in (*files.COMPRESSED, *ENDINGS):
        if name.lower().endswith(ending) and name.lower() != ending:
            name = name[: -len(ending)]
    return name


class Refusals:
    """Counts records that cannot be read; the first ones are named, too many are an error."""

    def __init__(self, file: UserFile, notes: Counter[str]) -> None:
        self.file, self.notes = file, notes
        self.records = 0
        self.refused: list[str] = []

    def refuse(self, where: str, why: str) -> None:
        self.refused.append(f"{self.file.path}{where}: {why}")
        self.notes[REFUSED] += 1

    def judge(self) -> None:
        if not self.refused:
            return
        first = "\n  ".join(self.refused[:3])
        share = len(self.refused) / max(self.records, 1)
        if share > REFUSED_SHARE:
            raise DataError(
                f"{len(self.refused)} of {self.records} records of {self.file.path} cannot be "
                f"read ({share:.0%}; up to {REFUSED_SHARE:.0%} would be left out):\n  {first}\n"
                "Mend or remove them."
            )
        log.warning("%d records are left out, the first:\n  %s", len(self.refused), first)


def documents(file: UserFile, notes: Counter[str]) -> Iterator[Text]:
    """The documents of one file; what had to be left out is counted in ``notes`` and said."""
    notes["files"] += 1
    if file.ending in PLAIN:
        yield from _plain(file)
        return
    refusals = Refusals(file, notes)
    for where, record in _records(file, refusals):
        refusals.records += 1
        try:
            yield _document(file, where, record)
        except (KeyError, TypeError, ValueError) as error:
            refusals.refuse(where, error.args[0] if error.args else "not a record")
    refusals.judge()


def _plain(file: UserFile) -> Iterator[Text]:
    """A text file in parts, read as a stream; it must be UTF-8 (or UTF-16 with its mark)."""
    from thimble.corpora.steps import pieces

    decoder, number, held, position = None, 0, "", 0

    def part(text: str, number: int) -> Text:
        id = f"{file.name}:{number}"
        return Text(id, text, file.name, "text", "unstated", id, prose=True)

    for chunk in files.chunks(file.path):
        if decoder is None:
            utf16 = chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            decoder = codecs.getincrementaldecoder("utf-16" if utf16 else "utf-8-sig")()
        held += _decode(decoder, chunk, file, position)
        position += len(chunk)
        *whole, held = pieces(held, PART_CHARACTERS) if len(held) > PART_CHARACTERS else [held]
        for text in whole:
            number += 1
            yield part(text, number)
    if decoder is not None:
        held += _decode(decoder, b"", file, position)
    if held.strip():
        yield part(held, number + 1)


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, file: UserFile, position: int) -> str:
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        offset = max(position + error.start - (len(error.object) - len(chunk)), 0)
        raise DataError(
            f"{file.path} is not {error.encoding.upper()}: {error.reason} at byte {offset}. "
            "Convert it (for example `iconv -f latin1 -t utf-8`), or leave it out."
        ) from error


def _records(file: UserFile, refusals: Refusals) -> Iterator[tuple[str, Any]]:
    if file.ending == ".parquet":
        yield from _parquet(file)
        return
    for number, line in enumerate(files.lines(file.path), 1):
        if not line.strip():
            continue
        try:
            yield f":{number}", json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            refusals.records += 1
            refusals.refuse(f":{number}", f"not UTF-8 ({error.reason} at byte {error.start})")
        except ValueError as error:
            refusals.records += 1
            refusals.refuse(f":{number}", f"not JSON ({error})")


def _parquet(file: UserFile) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    source: Any = file.path
    if not file.name.lower().endswith(".parquet"):  # a compressed one has to be read whole
        source = pa.BufferReader(files.read_bytes(file.path))
    try:
        with parquet.ParquetFile(source) as opened:
            for batch in opened.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f":{number}", row
    except (pa.ArrowException, OSError) as error:
        raise files.damaged(file.path, error) from error


def _document(file: UserFile, where: str, record: Any) -> Text:
    """A record as a document: ``text`` or ``content``, or ``conversations`` or ``messages``."""
    if not isinstance(record, dict):
        raise ValueError("not an object with a text or a conversation")
    id = f"{file.name}{where}"
    turns = record.get("conversations") or record.get("messages")
    licence = str(record.get("license") or record.get("licence") or "unstated")
    if isinstance(turns, list):
        text, conversation = _conversation(turns)
        return Text(id, text, file.name, QA, licence, str(record.get("group") or id), conversation)
    for key in TEXT_KEYS:
        if isinstance(record.get(key), str):
            group = str(record.get("group") or id)
            return Text(id, record[key], file.name, "text", licence, group, prose=True)
    keys = ", ".join(list(map(str, record))[:8]) or "nothing"
    raise ValueError(f"no text, content, conversations or messages, but: {keys}")


def _conversation(turns: list[Any]) -> tuple[str, str]:
    """The plain text and the SlimOrca form of a conversation; a system turn stands before it."""
    said: list[dict[str, str]] = []
    for turn in turns:
        role, value = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content")
        if role not in ROLES or not isinstance(value, str):
            raise ValueError(f"a turn by {role!r}, expected human, gpt or system, with its text")
        said.append({"from": ROLES[role], "value": value})
    system = [turn["value"] for turn in said if turn["from"] == "system"]
    talk = [turn for turn in said if turn["from"] != "system"]
    if len(talk) % 2 or any(t["from"] != ("human", "gpt")[i % 2] for i, t in enumerate(talk)):
        raise ValueError("the turns do not alternate between human and gpt")
    pairs = tuple((talk[i]["value"], talk[i + 1]["value"]) for i in range(0, len(talk), 2))
    text = "\n".join([*system, Question(pairs, "").text()])
    return text, json.dumps(said, ensure_ascii=False)
