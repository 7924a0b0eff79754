"""The steps of cleaning: each turns documents into documents and counts what it leaves out."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

MINIMUM_CHARACTERS = 50
MAXIMUM_CHARACTERS = 32_000
CONTROL_SHARE = 0.01
MINIMUM_QUALITY = 0.4
SHARDS = 16
COLUMNS = ("id", "text", "source", "category", "licence", "group", "conversation", "prose")
Documents = Iterable[Document]


class Step(PipelineStep):
    """A step that turns one document into any number of documents, and counts both sides."""

    type = "thimble"
    why = ""

    def change(self, document: Document) -> Iterator[Document]:
        raise NotImplementedError

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        counts: Counter[str] = Counter(documents_in=0, documents_out=0, bytes_in=0, bytes_out=0)
        for document in data:
            counts["documents_in"] += 1
            counts["bytes_in"] += utf8_length(document.text)
            for made in self.change(document):
                counts["documents_out"] += 1
                counts["bytes_out"] += utf8_length(made.text)
                yield made
        self.count(counts)

    def count(self, counts: Counter[str]) -> None:
        for label, value in counts.items():
            self.stat_update(label, value=value)


def utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class Extract(Step):
    """The documents of the items of one shard; ``read`` yields them for one item."""

    name = "extracted"
    why = "documents read from the sources"

    def __init__(
        self, items: list[Any], read: Callable[[Any, Counter[str]], Iterator[Any]]
    ) -> None:
        super().__init__()
        self.items, self.read = items, read

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        counts: Counter[str] = Counter(documents_out=0, bytes_out=0)
        for item in self.items[rank::world_size]:
            for text in self.read(item, counts):
                counts["documents_out"] += 1
                counts["bytes_out"] += utf8_length(text.text)
                facts = {
                    key: value for key, value in vars(text).items() if key not in ("id", "text")
                }
                yield Document(text.text, text.id, metadata=facts)
        self.count(counts)


# What may stand in a text: everything but C0 and C1 controls other than tab and newline, the
# replacement character (it marks bytes that were no text), and surrogates without a partner.
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd\ud800-\udfff\ufffe\uffff]")
INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n{4,}")


class NotBinary(Step):
    name = "binary"
    why = f"more than {CONTROL_SHARE:.0%} control or replacement characters"

    def change(self, document: Document) -> Iterator[Document]:
        text = document.text
        if len(CONTROL.findall(text)) <= CONTROL_SHARE * len(text):
            yield document


def normalise(text: str) -> str:
    """One line ending, NFC, no control or invisible characters, no trailing blanks.

    Indentation, tabs included, stays as it is.
    """
    if "\r" in text or not text.isascii():
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x85", "\n")
        text = text.replace("\u2028", "\n").replace("\u2029", "\n\n")
        text = INVISIBLE.sub("", text).replace("\u00a0", " ")
    text = text.replace("\f", "\n").replace("\v", "\n")
    text = CONTROL.sub("", text)
    if " \n" in text or "\t\n" in text or text[-1:] in (" ", "\t"):
        text = TRAILING.sub("", text)
    text = BLANK_LINES.sub("\n\n\n", text).strip("\n")
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class Normalise(Step):
    name = "normalised"
    why = "line endings, Unicode form, control characters, trailing blanks"

    def change(self, document: Document) -> Iterator[Document]:
        text = normalise(document.text)
        if text != document.text:
            self.stat_update("changed")
            document.text = text
        yield document


class LongEnough(Step):
    name = "too short"
    why = f"fewer than {MINIMUM_CHARACTERS} characters"

    def change(self, document: Document) -> Iterator[Document]:
        if len(document.text) >= MINIMUM_CHARACTERS:
            yield document


COMMON_WORDS = frozenset((
    "the", "of", "to", "and", "a", "in", "is", "it", "be", "for", "on", "or", "as", "with", "that",
    "this", "by", "are", "an", "from", "not", "if", "can", "will", "use", "at", "you", "which",
    "when", "may", "must", "has", "have",
))  # fmt: skip
WORDS = re.compile(r"[a-z]+")


def is_english(text: str) -> bool:
    """Whether prose is English: by its commonest words, else by the classifier of py3langid."""
    words = WORDS.findall(text[:4000].lower())
    # Where a tenth of the words are the commonest English ones there is nothing to classify;
    # this settles nine of ten documents without the classifier, which takes milliseconds.
    if sum(word in COMMON_WORDS for word in words) > 0.1 * len(words) and words:
        return True
    if sum(character > "\u024f" for character in text[:4000]) > 0.2 * len(text[:4000]):
        return False  # a fifth of the characters are of another script
    if len(words) < 80 and text.isascii():
        return True  # too little to judge: a table of contents, a list of names
    import py3langid

    return py3langid.classify(text[:2000])[0] in ("en", "zxx")


class English(Step):
    name = "language"
    why = "prose that is not English"

    def change(self, document: Document) -> Iterator[Document]:
        if not document.metadata["prose"] or is_english(document.text):
            yield document


# Letters, digits and blanks; every byte of a character beyond ASCII counts as a letter.
PLAIN = bytes(b for b in range(256) if chr(b).isalnum() or chr(b) in " \t\n" or b > 127)


def quality(text: str) -> float:
    """A score from 0 to 1: the worst of three signs of text that teaches nothing.

    - the share of letters, digits and blanks among the characters, 0.6 and more counting as 1;
    - the share of lines that are not a repetition of an earlier one, 0.3 and more counting as 1;
    - 20 divided by the mean length of a word, for dumps of encoded data.
    """
    if not text:
        return 0.0
    data = text.encode()
    plain = 1 - len(data.translate(None, PLAIN)) / len(data)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    words = text.split()
    return min(
        plain / 0.6,
        len(set(lines)) / len(lines) / 0.3 if lines else 0.0,
        20 * len(words) / max(sum(map(len, words)), 1),
        1.0,
    )


class Quality(Step):
    name = "quality"
    why = f"quality score below {MINIMUM_QUALITY} (symbols, repeated lines, encoded data)"

    def change(self, document: Document) -> Iterator[Document]:
        if quality(document.text) >= MINIMUM_QUALITY:
            yield document


class Save(PipelineStep):
    """Write a shard as parquet; ``digests=True`` also writes the hash of every text."""

    type, name = "thimble", "save"

    def __init__(self, folder: str, digests: bool = False) -> None:
        super().__init__()
        self.folder, self.digests = folder, digests

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        import pyarrow as pa
        from pyarrow import parquet

        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        schema = pa.schema(
            [(column, pa.bool_() if column == "prose" else pa.string()) for column in COLUMNS]
        )
        digests = bytearray()
        with parquet.ParquetWriter(
            folder / f"{rank:05d}.parquet", schema, compression="lz4"
        ) as file:
            rows: list[dict[str, Any]] = []
            size = 0
            for document in data:
                rows.append({"id": document.id, "text": document.text, **document.metadata})
                size += len(document.text)
                if self.digests:
                    digests += digest(document.text)
                if size > 4_000_000:
                    file.write_table(pa.Table.from_pylist(rows, schema))
                    rows, size = [], 0
                yield document
            if rows:
                file.write_table(pa.Table.from_pylist(rows, schema))
        if self.digests:
            (folder / f"{rank:05d}.digests").write_bytes(digests)


def digest(text: str) -> bytes:
    """16 bytes that are equal for texts equal up to case and white space."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


def rows_of(path: Path, columns: tuple[str, ...] = COLUMNS) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(2000, columns=list(columns)):
            yield from batch.to_pylist()


class Load(PipelineStep):
    """Read the shard that ``Save`` wrote for the same rank."""

    type, name = "thimble", "load"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for row in rows_of(Path(self.folder) / f"{rank:05d}.parquet"):
            yield Document(row.pop("text"), row.pop("id"), metadata=row)


BOUNDARIES = (
    re.compile(r"\n\n+(?=\S)"),
    re.compile(r"\n\n+"),
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?]) "),
    re.compile(r"\s"),
)


def pieces(text: str, limit: int) -> list[str]:
    """Cut a text into parts of at most ``limit`` characters; joined, they are the text again.

    A cut is made at the best boundary in the last third of a part: before an unindented line that
    follows a blank one, then any blank line, a line end, a sentence end, a blank, anywhere.
    """
    parts = []
    start = 0
    while len(text) - start > limit:
        # Parts of about equal size, so that no crumb remains at the end.
        remaining = len(text) - start
        end = start + min(limit, -(-remaining // -(-remaining // limit)) + limit // 10)
        low = start + (end - start) * 2 // 3
        for boundary in BOUNDARIES:
            if cuts := [match.end() for match in boundary.finditer(text, low, end)]:
                end = cuts[-1]
                break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


class Split(Step):
    name = "split"
    why = f"longer than {MAXIMUM_CHARACTERS:,} characters: cut at boundaries, nothing dropped"

    def change(self, document: Document) -> Iterator[Document]:
        parts = pieces(document.text, MAXIMUM_CHARACTERS)
        if len(parts) == 1:
            yield document
            return
        for number, part in enumerate(parts, 1):
            if text := part.strip("\n"):
                yield Document(text, f"{document.id}:{number}", metadata=dict(document.metadata))
