"""The ``man`` macro package (Linux manual pages) for the renderer in ``roff``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thimble.corpora.extract.roff import Page


def _title(page: Page, given: list[str], _: str) -> None:
    page.title, page.section = [*given, "", ""][:2]


def _font(page: Page, given: list[str], name: str) -> None:
    if not given:
        return
    # .BR and its like set their arguments without a space between them; .B, .I, .SM with one.
    joined = ("" if len(name) == 2 and name not in ("SM", "SB") else " ").join(given)
    if page.tag_follows:
        page.tag_follows = False
        page.tag.append(joined)
    else:
        page.words(joined)


def _paragraph(page: Page, _given: list[str], _: str) -> None:
    page.blank()
    page.indent = page.base + 1


def _tagged(page: Page, given: list[str], name: str) -> None:
    if name == "TQ":
        page.tag_follows = True
        return
    page.blank()
    page.indent = page.base + 2
    if name == "TP":
        page.tag_follows = True
    elif given and given[0].strip():
        if given[0].strip() in ("*", "o", "-", "+", "--", "·", "•"):
            page.indent = page.base + 1
            page.paragraph.append("*")
        elif re.fullmatch(r"[\[(]?\w{1,3}[\].):]*", given[0].strip()):
            page.indent = page.base + 1
            page.paragraph.append(given[0].strip())
        else:
            page.tag.append(given[0].strip())
    else:
        page.indent = page.base + 1 if name == "HP" else page.indent


def _shift(page: Page, _given: list[str], name: str) -> None:
    page.flush()
    if name == "RS":
        page.bases.append(page.base)
        page.base = page.indent if page.indent > page.base + 1 else page.base + 1
        page.indent = page.base + 1
    elif page.bases:
        page.base = page.bases.pop()
        page.indent = page.base + 1


def _verbatim(page: Page, _given: list[str], name: str) -> None:
    page.flush()
    page.fill = name in ("fi", "EE")


def _link(page: Page, given: list[str], name: str) -> None:
    if name in ("UR", "MT"):
        page.strings[" link"] = given[0] if given else ""
    elif link := page.strings.pop(" link", ""):
        page.words(f"<{link}>" + (given[0] if given else ""))


def _section(page: Page, given: list[str], name: str) -> None:
    page.heading(" ".join(given), 0 if name == "SH" else 1)


def _break(page: Page, _given: list[str], name: str) -> None:
    if name == "sp":
        page.blank()
    else:
        page.flush()


def _synopsis(page: Page, given: list[str], name: str) -> None:
    if name == "SY":
        page.flush()
        page.words(" ".join(given))
    elif name == "OP":
        page.words("[" + " ".join(given) + "]")
    else:
        page.flush()


MAN: dict[str, Callable[[Page, list[str], str], None]] = {
    "TH": _title,
    **dict.fromkeys(("SH", "SS"), _section),
    **dict.fromkeys(("PP", "P", "LP", "Pp"), _paragraph),
    **dict.fromkeys(("TP", "IP", "HP", "TQ"), _tagged),
    **dict.fromkeys(("RS", "RE"), _shift),
    **dict.fromkeys(("nf", "fi", "EX", "EE"), _verbatim),
    **dict.fromkeys(("UR", "UE", "MT", "ME"), _link),
    **dict.fromkeys(("br", "sp", "ti", "in", "ce"), _break),
    **dict.fromkeys(("SY", "OP", "YS"), _synopsis),
    **dict.fromkeys(("B", "I", "R", "SM", "SB", "BR", "BI", "IB", "IR", "RB", "RI", "CW"), _font),
}
