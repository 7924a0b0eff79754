"""``pci.ids`` and ``usb.ids``: vendor by vendor as documents, and as facts for questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass
class Vendor:
    """A vendor of one bus with its devices; ids are four hexadecimal digits."""

    id: str
    name: str
    devices: list[tuple[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def vendors(text: str) -> Iterator[Vendor]:
    """The vendors of an id file; the lists of classes that follow them are not vendors."""
    current: Vendor | None = None
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line[0] != "\t":
            if current:
                yield current
            current = None
            id, _, name = line.partition("  ")
            if len(id) == 4 and all(digit in "0123456789abcdef" for digit in id.lower()):
                current = Vendor(id, name.strip(), lines=[line])
        elif current:
            current.lines.append(line)
            if line[1:2] != "\t":
                id, _, name = line.strip().partition("  ")
                current.devices.append((id, name.strip()))
    if current:
        yield current


def grouped(vendors: Iterable[Vendor], characters: int = 2000) -> Iterator[list[Vendor]]:
    """Neighbouring vendors together until there is text enough for a document."""
    group: list[Vendor] = []
    size = 0
    for vendor in vendors:
        group.append(vendor)
        size += sum(map(len, vendor.lines))
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def classes(text: str) -> Iterator[tuple[str, list[str]]]:
    """The device classes (``C 02  Network controller``) with their subclasses, as lines."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if line[0] != "\t":
            if lines:
                yield lines[0], lines
            lines = [line] if line.startswith("C ") else []
        elif lines:
            lines.append(line)
    if lines:
        yield lines[0], lines
