"""What a question made by ``questions`` asks and answers, read back from its text.

Four skills: which hardware an ID names, which driver or binding a compatible string belongs to,
which command does something, which package to install for something. The wordings here are those of
``questions``; one that gives the answer away, or does not hold all parts of its fact, makes none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

HARDWARE, DRIVER = "hardware identification", "driver selection"
COMMAND, INSTALLATION = "command completion", "installation steps"
SKILLS = (HARDWARE, DRIVER, COMMAND, INSTALLATION)


@dataclass(frozen=True)
class Fact:
    """``prompt`` asks for ``answer``; equal ``key`` means the same fact in another wording.

    ``form``: facts of one form have answers built alike. ``proof``: the words by which the fact
    would be recognised in a text.
    """

    skill: str
    key: str
    form: str
    prompt: str
    answer: str
    proof: str


def fact_of(text: str, group: str) -> Fact | None:
    """The fact in a document ``Question: ...\\nAnswer: ...`` of this group, or None."""
    kind, _, name = group.partition(":")
    make = MAKERS.get(kind)
    return make(text, kind, name) if make else None


def _ask(question: str, beginning: str = "") -> str:
    return f"Question: {question}\nAnswer:{beginning}"


def _match(patterns: list[str], text: str) -> re.Match[str] | None:
    matches = (re.match(f"Question: {pattern}", text) for pattern in patterns)
    return next((found for found in matches if found), None)


DEVICE = [
    r"What device is \S+ \S+\?\nAnswer: \S+ is the (?P<device>.+) by (?P<vendor>.+)\.",
    r"[a-z -]+ shows the ID \S+\. Which hardware is that\?\n"
    r"Answer: That is (?P<device>.+), made by (?P<vendor>.+)\.",
    r"Which device of (?P<vendor>.+) has the device ID \S+\?\n"
    r"Answer: On the \S+ bus, device \S+ of .+ \(vendor \S+\) is (?P<device>.+)\.",
    r"Identify the \S+ device with vendor \S+ and device \S+\.\n"
    r"Answer: Vendor \S+ is (?P<vendor>.+), and its device \S+ is (?P<device>.+)\.",
]


def _device(text: str, bus: str, identity: str) -> Fact | None:
    found = _match(DEVICE, text)
    if not found or ":" not in identity:  # the group of a vendor has no second part
        return None
    return Fact(
        HARDWARE,
        f"{bus}:{identity}",
        bus,
        _ask(f"What device is {bus} {identity}?", f" {identity} is the"),
        f" {found['device']} by {found['vendor']}.",
        found["device"],
    )


BINDING = [
    r'Which device has the device-tree compatible string "(?P<name>[^"]+)"\?\n'
    r"Answer: \S+ is covered by the binding: (?P<title>.+)\.",
    r'A device-tree node says compatible = "(?P<name>[^"]+)"\. What hardware is it\?\n'
    r"Answer: The binding for it is titled: (?P<title>.+)\.",
    r'Which binding documents "(?P<name>[^"]+)"\?\nAnswer: The one for: (?P<title>.+)\.',
]


def _binding(text: str, kind: str, _: str) -> Fact | None:
    found = _match(BINDING, text)
    if not found:
        return None
    name = found["name"]
    prompt = _ask(f'Which binding documents "{name}"?', " The one for:")
    # Without the quotes: in the binding itself, a YAML file, the name stands bare.
    return Fact(DRIVER, f"{kind}:{name}", kind, prompt, f" {found['title']}.", name)


MATCHED = [
    r'Which Linux driver handles "[^"]+"\?\nAnswer: (?P<path>\S+) matches ',
    r'Where is the driver for the compatible string "[^"]+"\?\n'
    r"Answer: In (?P<path>\S+) of the Linux source\.",
]


def _driver(text: str, kind: str, name: str) -> Fact | None:
    found = _match(MATCHED, text)
    if not found:
        return None
    prompt = _ask(f'Where is the driver for the compatible string "{name}"?', " In")
    answer = f" {found['path']} of the Linux source."
    return Fact(DRIVER, f"{kind}:{name}", kind, prompt, answer, name)


PAGE = [
    r"What is (?P<name>\S+) on \S+\?\nAnswer: \S+ is a [a-z ]+: (?P<about>.+)\.",
    r"What does the manual page (?P<name>\S+)\(\w+\) describe\?\n"
    r"Answer: \S+ describes: (?P<about>.+)\.",
    r"Which \S+ [a-z ]+ is described as: (?P<about>.+)\?\nAnswer: (?P<name>\S+)\(\w+\)\.",
    r"What is the command (?P<name>\S+) for\?\nAnswer: \S+: (?P<about>.+)\.",
    r"How do I read about (?P<name>\S+)\?\nAnswer: Run `[^`]+`; it says: (?P<about>.+)\.",
]


def _command(text: str, kind: str, page: str) -> Fact | None:
    found = _match(PAGE, text)
    where = re.fullmatch(r"(?P<system>[^:]+):\S+\((?P<section>\w+)\)", page)
    if not found or not where or where["section"][:1] not in "18":
        return None
    system, section = where["system"], where["section"]
    word = "command" if section.startswith("1") else "administration command"
    return Fact(
        COMMAND,
        f"{kind}:{page}",
        f"{system} {section[:1]}",
        _ask(f"Which {system} {word} is described as: {found['about']}?"),
        f" {found['name']}({section}).",
        found["about"],
    )


PACKAGE = [
    r"What is the Debian package (?P<name>\S+)\?\nAnswer: \S+ is described as: (?P<about>.+)\.",
    r"What does installing (?P<name>\S+) give me\?\nAnswer: The package \S+: (?P<about>.+)\.",
    r"Which Debian package is described as: (?P<about>.+)\?\nAnswer: (?P<name>\S+), in ",
    r"How do I install (?P<name>\S+) on Debian, and what is it\?\n"
    r"Answer: Run `apt install \S+` as root\. It is described as: (?P<about>.+)\.",
]


def _package(text: str, kind: str, name: str) -> Fact | None:
    found = _match(PACKAGE, text)
    if not found:
        return None
    about = found["about"]
    prompt = _ask(f"Which Debian package is described as: {about}?")
    answer = f" {name}. Install it with `apt install {name}`."
    return Fact(INSTALLATION, f"{kind}:{name}", kind, prompt, answer, about)


# The first part of a question's group -> how its fact is read.
MAKERS: dict[str, Callable[[str, str, str], Fact | None]] = {
    "PCI": _device,
    "USB": _device,
    "binding": _binding,
    "driver-for": _driver,
    "man": _command,
    "package": _package,
}
