"""From files to documents: one reader for each kind of material."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from thimble.corpora import files, questions, recipe
from thimble.corpora.extract import ids, kernel, roff
from thimble.corpora.sources import debian

# Kinds whose text is prose, so that the language filter may judge it.
PROSE = frozenset({"manual", "document", "handbook"})


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
    prose: bool = False


def read_text(item: Item, notes: Counter[str]) -> str:
    """A file as text: UTF-8, else Latin-1, which older manual pages and sources are written in."""
    data = files.read_bytes(item.path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        notes["files_read_as_latin1"] += 1
        return data.decode("latin-1")


def documents(item: Item, notes: Counter[str]) -> Iterator[Text]:
    """All documents of one file; the questions made from it follow with the category ``qa``.

    Questions are numbered through the file, so every document has an id of its own.
    """
    number = 0
    for made in KINDS[item.kind](item, read_text(item, notes)):
        if isinstance(made, Text):
            yield made
            continue
        yield Text(
            f"{item.source}/{item.name}?{number}",
            made.text(),
            item.source,
            recipe.QA,
            item.licence,
            made.group,
            json.dumps(made.conversation(), ensure_ascii=False),
        )
        number += 1


Made = Iterator[Text | questions.Question]


def _text(item: Item, text: str, category: str, part: str = "") -> Text:
    id = f"{item.source}/{item.name}{part}"
    prose = item.kind in PROSE
    return Text(id, text, item.source, category, item.licence, id, prose=prose)


NAME = re.compile(r"^NAME\n+\s*(.+?)\s+-+\s+(.+)$", re.MULTILINE)


def _manual(item: Item, source: str) -> Made:
    _, section, text = roff.render(source)
    if not text:
        return
    section = section or Path(item.name.removesuffix(".gz")).suffix[1:]
    category = item.category or recipe.SECTIONS.get(section[:1], recipe.ADMINISTRATION)
    yield _text(item, text, category)
    name = NAME.search(text)
    if name and len(name.group(2)) < 300:
        names = [one for one in name.group(1).split(", ") if re.fullmatch(r"[\w.+:-]{1,40}", one)]
        system = "FreeBSD" if "freebsd" in item.source else "Linux"
        yield from questions.of_manual_page(names[:12], section, name.group(2), system)


def _bus(item: Item, source: str) -> Made:
    for group in ids.grouped(ids.vendors(source)):
        text = "\n".join(line for vendor in group for line in vendor.lines)
        yield _text(item, text, recipe.HARDWARE, f"#{group[0].id}")
        for vendor in group:
            yield from questions.of_vendor(vendor, item.kind.upper())
    for head, lines in ids.classes(source):
        yield _text(item, "\n".join(lines), recipe.HARDWARE, f"#class-{head.split()[1]}")


def _document(item: Item, source: str) -> Made:
    yield _text(item, source, item.category or recipe.kernel_category(item.name))


def _binding(item: Item, source: str) -> Made:
    yield _text(item, source, recipe.HARDWARE)
    yield from questions.of_binding(*kernel.binding(source))


def _code(item: Item, source: str) -> Made:
    name = re.sub(r"^(?:usr/src/)?linux-[^/]+/", "", item.name)
    if text := kernel.comments(source, name):
        yield _text(item, text, item.category or recipe.kernel_category(name))
    if name.startswith(("drivers/", "sound/")):
        yield from questions.of_driver(name, *kernel.driver(source))


def _kconfig(item: Item, source: str) -> Made:
    entries = list(kernel.kconfig(source))
    if entries:
        text = "\n\n".join(entry for *_, entry in entries)
        yield _text(item, text, item.category or recipe.kernel_category(item.name))
    for symbol, prompt, help_, _ in entries:
        yield from questions.of_option(symbol, prompt, help_)


def _handbook(item: Item, source: str) -> Made:
    """A book as one text file: its chapters become documents of their own."""
    for number, chapter in enumerate(re.split(r"\n(?=Chapter \d+)", source)):
        yield _text(item, chapter, item.category or recipe.ADMINISTRATION, f"#{number}")


def _descriptions(item: Item, source: str) -> Made:
    for fields in debian.stanzas(source.splitlines()):
        yield from questions.of_package(fields["Package"], fields["Description"], fields["Section"])


KINDS: dict[str, Callable[[Item, str], Made]] = {
    "manual": _manual,
    "pci": _bus,
    "usb": _bus,
    "document": _document,
    "binding": _binding,
    "devicetree": _document,
    "code": _code,
    "kconfig": _kconfig,
    "handbook": _handbook,
    "descriptions": _descriptions,
}
