"""From files to documents: one reader for each kind of material."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from thimble.corpora import questions, recipe
from thimble.corpora.extract import ids, kernel, roff
from thimble.errors import DataError


@dataclass(frozen=True)
class Item:
    """One file to be read: where it is, how it is read, what its documents are called."""

    path: str
    name: str  # the file's name inside its package
    kind: str
    source: str
    category: str | None
    licence: str


@dataclass(frozen=True)
class Text:
    """A document as it was extracted, before cleaning; ``conversation`` is JSON or empty."""

    id: str
    text: str
    source: str
    category: str
    licence: str
    group: str
    conversation: str = ""


def read_bytes(path: str | Path) -> bytes:
    """A file's content, decompressed by its ending; DataError when it is truncated or damaged."""
    data = Path(path).read_bytes()
    name = str(path)
    try:
        if name.endswith(".gz"):
            return gzip.decompress(data)
        if name.endswith(".xz"):
            return lzma.decompress(data)
        if name.endswith(".zst"):
            import zstandard

            with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as file:
                content = file.read()
            zstd_complete(data, path)
            return content
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or damaged: {error}.") from error
    return data


def zstd_complete(data: bytes, path: str | Path) -> None:
    """zstandard reads a truncated frame without complaint; its decompressor object knows."""
    import zstandard

    rest = data
    try:
        while rest:
            frame = zstandard.ZstdDecompressor().decompressobj()
            frame.decompress(rest)
            if not frame.eof:
                raise DataError(f"{path} is truncated: its last zstd frame does not end.")
            rest = frame.unused_data
    except zstandard.ZstdError as error:
        raise DataError(f"{path} is damaged: {error}.") from error


def read_text(path: str | Path) -> str:
    """A file as text: UTF-8, else Latin-1, which older manual pages and sources are written in."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def documents(item: Item) -> Iterator[Text]:
    """All documents of one file; the questions made from it follow with the category ``qa``."""
    yield from KINDS[item.kind](item)


def _text(item: Item, text: str, category: str, id: str = "", group: str = "") -> Text:
    id = f"{item.source}/{id or item.name}"
    return Text(id, text, item.source, category, item.licence, group or id)


def _asked(item: Item, made: Iterator[questions.Question]) -> Iterator[Text]:
    for number, question in enumerate(made):
        yield Text(
            f"{item.source}/{item.name}?{number}",
            question.text(),
            item.source,
            recipe.QA,
            item.licence,
            question.group,
            json.dumps(question.conversation(), ensure_ascii=False),
        )


NAME = re.compile(r"^NAME\n+\s*(.+?)\s+-+\s+(.+)$", re.MULTILINE)


def _manual(item: Item) -> Iterator[Text]:
    title, section, text = roff.render(read_text(item.path))
    if not text:
        return
    section = section or Path(item.name.removesuffix(".gz")).suffix[1:]
    category = item.category or recipe.SECTIONS.get(section[:1], recipe.ADMINISTRATION)
    yield _text(item, text, category)
    if name := NAME.search(text):
        system = "FreeBSD" if "freebsd" in item.source else "Linux"
        for one in name.group(1).split(", ")[:12]:
            if re.fullmatch(r"[\w.+:-]{1,40}", one) and len(name.group(2)) < 300:
                yield from _asked(
                    item, questions.of_manual_page(one, section, name.group(2), system)
                )


def _bus(item: Item) -> Iterator[Text]:
    bus = item.kind.upper()
    text = read_text(item.path)
    for vendor in ids.vendors(text):
        yield _text(item, "\n".join(vendor.lines), recipe.HARDWARE, f"{item.name}#{vendor.id}")
        yield from _asked(item, questions.of_vendor(vendor, bus))
    for head, lines in ids.classes(text):
        yield _text(item, "\n".join(lines), recipe.HARDWARE, f"{item.name}#{head.split()[1]}")


def _document(item: Item) -> Iterator[Text]:
    category = item.category or recipe.kernel_category(item.name)
    yield _text(item, read_text(item.path), category)


def _binding(item: Item) -> Iterator[Text]:
    text = read_text(item.path)
    yield _text(item, text, recipe.HARDWARE)
    title, about, names = kernel.binding(text)
    if title:
        yield from _asked(item, questions.of_binding(title, about, names))


def _code(item: Item) -> Iterator[Text]:
    source = read_text(item.path)
    category = item.category or recipe.kernel_category(item.name)
    name = re.sub(r"^usr/src/[^/]+/|^linux-source-[^/]+/", "", item.name)
    if text := kernel.comments(source, name):
        yield _text(item, text, category)
    if name.startswith("drivers/"):
        yield from _asked(item, questions.of_driver(name, *kernel.driver(source)))


def _kconfig(item: Item) -> Iterator[Text]:
    category = item.category or recipe.kernel_category(item.name)
    entries = list(kernel.kconfig(read_text(item.path)))
    if entries:
        yield _text(item, "\n\n".join(entry for *_, entry in entries), category)
    for symbol, prompt, help_, _ in entries:
        yield from _asked(item, questions.of_option(symbol, prompt, help_))


def _handbook(item: Item) -> Iterator[Text]:
    """A book as one text file: chapters become documents of their own."""
    text = read_text(item.path)
    for number, chapter in enumerate(re.split(r"\n(?=Chapter \d+)", text)):
        yield _text(item, chapter, item.category or recipe.ADMINISTRATION, f"{item.name}#{number}")


KINDS: dict[str, Callable[[Item], Iterator[Text]]] = {
    "manual": _manual,
    "pci": _bus,
    "usb": _bus,
    "document": _document,
    "binding": _binding,
    "devicetree": _document,
    "code": _code,
    "kconfig": _kconfig,
    "handbook": _handbook,
}
