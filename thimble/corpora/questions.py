"""Questions and answers made from structured data, in varied wording.

Every answer states only what its source states. The wording of a fact is picked by a hash of the
fact, so the same source always gives the same questions; all wordings of one fact share a group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from thimble.corpora.extract.ids import Vendor


class Question(NamedTuple):
    """One or more turns about one fact; ``group`` names the fact."""

    turns: tuple[tuple[str, str], ...]
    group: str

    def text(self) -> str:
        """The plain document: ``Question: ...`` and ``Answer: ...`` on a line each."""
        return "\n".join(
            f"Question: {question}\nAnswer: {answer}" for question, answer in self.turns
        )

    def conversation(self) -> list[dict[str, str]]:
        """The turns as SlimOrca's records have them."""
        return [
            {"from": speaker, "value": value}
            for question, answer in self.turns
            for speaker, value in (("human", question), ("gpt", answer))
        ]


def pick(key: str, count: int, of: int) -> list[int]:
    """``count`` different numbers below ``of``, decided by ``key`` alone."""
    digest = hashlib.sha256(key.encode()).digest()
    first = int.from_bytes(digest[:4], "big") % of
    step = 1 + int.from_bytes(digest[4:8], "big") % (of - 1) if of > 1 else 1
    chosen = dict.fromkeys((first + step * index) % of for index in range(of))
    rest = dict.fromkeys([*chosen, *range(of)])
    return list(rest)[:count]


def ask(group: str, wordings: list[tuple[str, str]], count: int = 1) -> Iterator[Question]:
    for index in pick(group, min(count, len(wordings)), len(wordings)):
        yield Question((wordings[index],), group)


def of_vendor(vendor: Vendor, bus: str) -> Iterator[Question]:
    """Questions about a vendor of ``bus`` ("PCI" or "USB") and each of its devices."""
    v, name = vendor.id, vendor.name
    yield from ask(
        f"{bus}:{v}",
        [
            (
                f"Which vendor has the {bus} vendor ID {v}?",
                f"{bus} vendor ID {v} belongs to {name}.",
            ),
            (f"What is the {bus} vendor ID of {name}?", f"The {bus} vendor ID of {name} is {v}."),
            (
                f"A device reports the {bus} vendor ID 0x{v}. Who made it?",
                f"The ID 0x{v} is registered for {name}.",
            ),
        ],
        2,
    )
    tool = "lspci -nn" if bus == "PCI" else "lsusb"
    for d, device in vendor.devices:
        yield from ask(
            f"{bus}:{v}:{d}",
            [
                (f"What device is {bus} {v}:{d}?", f"{v}:{d} is the {device} by {name}."),
                (
                    f"{tool} shows the ID {v}:{d}. Which hardware is that?",
                    f"That is {device}, made by {name}.",
                ),
                (
                    f"What is the {bus} ID of the {name} {device}?",
                    f"Its {bus} ID is {v}:{d}: vendor {v}, device {d}.",
                ),
                (
                    f"Which device of {name} has the device ID {d}?",
                    f"On the {bus} bus, device {d} of {name} (vendor {v}) is {device}.",
                ),
                (
                    f"Identify the {bus} device with vendor {v} and device {d}.",
                    f"Vendor {v} is {name}, and its device {d} is {device}.",
                ),
            ],
        )


PAGES = {
    "1": "command", "2": "system call", "3": "library function", "4": "device or driver",
    "5": "file format", "7": "topic", "8": "administration command", "9": "kernel interface",
}  # fmt: skip


def of_manual_page(names: list[str], section: str, about: str, system: str) -> Iterator[Question]:
    """Questions from the NAME line of a manual page; ``system`` is "Linux" or "FreeBSD".

    The names of one page share a description, so their questions share a group.
    """
    kind = PAGES.get(section[:1], "page")
    about = about.strip().rstrip(".")
    for name in names:
        page = f"{name}({section})"
        wordings = [
            (f"What is {name} on {system}?", f"{page} is a {kind}: {about}."),
            (f"What does the manual page {page} describe?", f"{page} describes: {about}."),
            (
                f"Where is {name} documented on {system}?",
                f"In section {section} of the manual, as {page} ({about}). Read it with "
                f"`man {section} {name}`.",
            ),
            (f"Which {system} {kind} is described as: {about}?", f"{page}."),
        ]
        if section[:1] in "18":
            wordings += [
                (f"What is the command {name} for?", f"{name}: {about}."),
                (f"How do I read about {name}?", f"Run `man {section} {name}`; it says: {about}."),
            ]
        if section[:1] in "239":
            wordings.append((f"What does {name}() do?", f"{name}(): {about}. See {page}."))
        group = f"man:{system}:{names[0]}({section})"
        chosen = pick(f"{group}:{name}", 3, len(wordings))
        if chosen[0] == 0:
            # One page in five or so becomes a conversation of two turns.
            more = ("And how do I read more about it?", f"With `man {section} {name}`.")
            yield Question((wordings[0], more), group)
            chosen = chosen[1:2]
        for index in chosen:
            yield Question((wordings[index],), group)


def of_package(name: str, summary: str, section: str) -> Iterator[Question]:
    """Questions about a Debian package from the short description in its control file."""
    yield from ask(
        f"package:{name}",
        [
            (f"What is the Debian package {name}?", f"{name} is described as: {summary}."),
            (f"What does installing {name} give me?", f"The package {name}: {summary}."),
            (
                f"Which Debian package is described as: {summary}?",
                f"{name}, in the section {section}. Install it with `apt install {name}`.",
            ),
            (
                f"How do I install {name} on Debian, and what is it?",
                f"Run `apt install {name}` as root. It is described as: {summary}.",
            ),
        ],
    )


def of_option(symbol: str, prompt: str, help_: str) -> Iterator[Question]:
    """Questions about a kernel configuration option from its Kconfig entry."""
    said = " ".join(help_.split())
    yield from ask(
        f"kconfig:{symbol}",
        [
            (f"What does the kernel option CONFIG_{symbol} do?", f"{prompt}: {said}"),
            (
                f"Should I enable CONFIG_{symbol} in my Linux kernel?",
                f"CONFIG_{symbol} is: {prompt}. {said}",
            ),
            (
                f'Which kernel option is called "{prompt}"?',
                f"CONFIG_{symbol}. Its help says: {said}",
            ),
        ],
    )


def of_binding(title: str, about: str, names: list[str]) -> Iterator[Question]:
    """Questions about a device-tree binding: its compatible strings, title and description.

    One binding may list hundreds of strings for one title; a dozen of them are asked about.
    """
    if " " not in title:
        return  # "QCOM." answers nothing
    group = f"binding:{title}"
    for place in sorted(pick(group, 12, len(names)) if names else []):
        name = names[place]
        wordings = [
            (
                f'Which device has the device-tree compatible string "{name}"?',
                f'"{name}" is covered by the binding: {title}.',
            ),
            (
                f'A device-tree node says compatible = "{name}". What hardware is it?',
                f"The binding for it is titled: {title}.",
            ),
            (f'Which binding documents "{name}"?', f"The one for: {title}."),
        ]
        yield Question((wordings[pick(name, 1, 3)[0]],), group)
    if about:
        yield Question(
            ((f"What is said about the {title} in the device-tree bindings?", about),), group
        )


def of_driver(path: str, about: str, names: list[str]) -> Iterator[Question]:
    """Questions from a driver's MODULE_DESCRIPTION and its table of compatible strings."""
    about = about.strip().rstrip(".")
    module = path.rsplit("/", 1)[-1].removesuffix(".c")
    if about:
        yield from ask(
            f"driver:{path}",
            [
                (f"What is the Linux kernel driver in {path}?", f"{path} is: {about}."),
                (f"Where in the Linux source is this driver: {about}?", f"In {path}."),
                (f"What does the kernel module built from {module}.c do?", f"{about} ({path})."),
            ],
        )
    for name in names:
        yield from ask(
            f"driver-for:{name}",
            [
                (
                    f'Which Linux driver handles "{name}"?',
                    f'{path} matches "{name}"' + (f": {about}." if about else "."),
                ),
                (
                    f'Where is the driver for the compatible string "{name}"?',
                    f"In {path} of the Linux source.",
                ),
            ],
        )
