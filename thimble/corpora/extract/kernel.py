"""Prose and descriptions inside the kernel's tree: comments, Kconfig help, bindings, rst."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Strings come first, so that a "/*" inside one does not open a comment.
TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|/\*.*?\*/|//[^\n]*', re.DOTALL)
LICENCE = re.compile(
    r"SPDX-License-Identifier|GNU General Public License|Redistribution and use in source|"
    r"Permission is hereby granted|Licensed under|WITHOUT ANY WARRANTY|All rights reserved",
    re.IGNORECASE,
)
COPYRIGHT = re.compile(r"^\s*(?:\(C\)|copyright\b|author[s:]|©).*$", re.IGNORECASE | re.MULTILINE)
DECLARATION = re.compile(r"[^\n;{]*(?:\n[^\n;{]*){0,6}?[;{]")
SPDX = re.compile(r"SPDX-License-Identifier:\s*(.+?)\s*(?:\*/|$)", re.MULTILINE)


def comment_text(raw: str) -> str:
    """A comment without its decoration; indentation inside it stays."""
    if raw.startswith("//"):
        return raw.lstrip("/").strip()
    body = raw[2:-2].removeprefix("*")
    lines: list[str] = []
    for line in body.split("\n"):
        bare = re.sub(r"^[ \t]*\*(?!/) ?", "", line) if lines or line.strip() else line
        lines.append(bare.rstrip().rstrip("*").rstrip() if set(bare) != {"*"} else "")
    text = "\n".join(lines).strip("\n")
    return text.strip() if "\n" not in text else _dedent(text)


def _dedent(text: str) -> str:
    first, *rest = text.split("\n")
    widths = [len(line) - len(line.lstrip()) for line in rest if line.strip()]
    width = min(widths, default=0)
    return "\n".join([first.strip(), *(line[width:] for line in rest)])


def comments(source: str, path: str, minimum: int = 60) -> str:
    """The comments of a C file, each followed by the declaration it stands before.

    Licence texts, copyright lines and comments shorter than ``minimum`` characters are left out.
    Returns "" when nothing remains.
    """
    found: list[str] = []
    position = 0
    matches = [m for m in TOKEN.finditer(source) if m.group().startswith("/")]
    index = 0
    while index < len(matches):
        match = matches[index]
        index += 1
        if match.start() < position:
            continue
        raw = match.group()
        end = match.end()
        # Lines of // comments that follow each other are one comment.
        if raw.startswith("//"):
            parts = [comment_text(raw)]
            while index < len(matches) and matches[index].group().startswith("//"):
                between = source[end : matches[index].start()]
                if between.count("\n") != 1 or between.strip():
                    break
                parts.append(comment_text(matches[index].group()))
                end = matches[index].end()
                index += 1
            text = "\n".join(parts)
        else:
            text = comment_text(raw)
        if len(text) < minimum or LICENCE.search(text):
            continue
        text = COPYRIGHT.sub("", text).strip()
        if len(text) < minimum:
            continue
        line_start = source.rfind("\n", 0, match.start()) + 1
        after = ""
        if not source[line_start : match.start()].strip():
            rest = source[end : end + 600]
            stripped = rest.lstrip("\n")
            if len(rest) - len(stripped) <= 2 and (code := DECLARATION.match(stripped)):
                after = code.group().rstrip().rstrip("{").rstrip()
                if "/*" in after or after.startswith(("}", "#endif", "#else")):
                    after = ""
        found.append(f"/* {text} */\n{after}" if after else f"/* {text} */")
    if not found:
        return ""
    return f"{path}\n\n" + "\n\n".join(found)


CONFIG = re.compile(r"^(?:menu)?config[ \t]+(\w+)[ \t]*$", re.MULTILINE)
PROMPT = re.compile(r'^\s+(?:bool|tristate|string|hex|int|prompt)\s+"((?:[^"\\]|\\.)*)"', re.M)
HELP = re.compile(r"^[ \t]+(?:---)?help(?:---)?[ \t]*\n((?:[ \t]+[^\n]*\n|[ \t]*\n)*)", re.M)


def kconfig(source: str) -> Iterator[tuple[str, str, str, str]]:
    """The options of a Kconfig file: symbol, prompt, help text, the whole entry."""
    starts = [*CONFIG.finditer(source)]
    for index, match in enumerate(starts):
        end = starts[index + 1].start() if index + 1 < len(starts) else len(source)
        entry = source[match.start() : end]
        if cut := re.search(
            r"^(?:endif|endmenu|if|menu|source|choice|endchoice|comment)\b", entry[6:], re.M
        ):
            entry = entry[: 6 + cut.start()]
        prompt, help_ = PROMPT.search(entry), HELP.search(entry)
        if prompt and help_:
            body = "\n".join(line.strip() for line in help_.group(1).strip().splitlines())
            yield match.group(1), prompt.group(1), body, entry.rstrip()


def binding(source: str) -> tuple[str, str, list[str]]:
    """Title, description and compatible strings of a device-tree binding (YAML schema)."""
    title = re.search(r"^title:\s*(.+?)\s*$", source, re.M)
    described = re.search(r"^description:\s*[|>+-]*\s*\n((?:[ \t]+[^\n]*\n|\n)+)", source, re.M)
    block = re.search(r"^  compatible:\n((?:    .*\n|\n)*)", source, re.M)
    names = (
        re.findall(r"(?:const:|-)\s+([\w.-]+,[\w.,+-]+)\s*$", block.group(1), re.M) if block else []
    )
    text = " ".join(described.group(1).split()) if described else ""
    return (title.group(1).strip("'\"") if title else ""), text, list(dict.fromkeys(names))


DRIVER_TABLE = re.compile(r"\b(?:PCI_DEVICE|PCI_VDEVICE|USB_DEVICE)\s*\(\s*(\w+)\s*,\s*(\w+)\s*\)")
DESCRIPTION = re.compile(r'MODULE_DESCRIPTION\s*\(\s*"((?:[^"\\]|\\.)*)"')
COMPATIBLE = re.compile(r'\.compatible\s*=\s*"([^"]+)"')


def driver(source: str) -> tuple[str, list[str]]:
    """A driver's module description and the compatible strings in its match tables."""
    described = DESCRIPTION.search(source)
    return (described.group(1) if described else ""), list(
        dict.fromkeys(COMPATIBLE.findall(source))
    )
