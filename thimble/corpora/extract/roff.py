"""Manual pages as compact text: a small renderer for the ``man`` and ``mdoc`` macro packages.

A paragraph becomes one line, neither wrapped nor justified, without page headers and footers;
headings stand at the margin, list bodies and displays are indented by four spaces, and what the
page sets verbatim (``.nf``, ``.EX``, ``.Bd -literal``) keeps its own lines and indentation.

This is the part of roff that manual pages use: requests, strings, conditions, user macros, tables.
It is not a typesetter. Unknown requests are ignored, as roff does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from thimble.corpora.extract.man import MAN
from thimble.corpora.extract.mdoc import Mdoc

INDENT = "    "

SPECIAL = {
    "bu": "*", "em": "--", "en": "-", "hy": "-", "mi": "-", "lq": '"', "rq": '"', "dq": '"',
    "oq": "'", "cq": "'", "aq": "'", "ga": "`", "ti": "~", "ha": "^", "at": "@", "sh": "#",
    "Do": "$", "rs": "\\", "sl": "/", "ba": "|", "br": "|", "bv": "|", "or": "|", "ul": "_",
    "lB": "[", "rB": "]", "lC": "{", "rC": "}", "la": "<", "ra": ">", "lA": "<=", "co": "(C)",
    "rg": "(R)", "tm": "(TM)", "<=": "<=", ">=": ">=", "!=": "!=", "==": "==", "~=": "~=",
    "->": "->", "<-": "<-", "=>": "=>", "rA": "=>", "mu": "x", "tmu": "x", "di": "/", "+-": "+/-",
    "t+-": "+/-", "pl": "+", "eq": "=", "**": "*", "*a": "alpha", "*b": "beta", "*m": "mu",
    "*p": "pi", "mc": "µ", "de": "°", "sc": "§", "if": "infinity", "ss": "ss", "ae": "ae",
    "12": "1/2", "14": "1/4", "34": "3/4", "Fo": "<<", "Fc": ">>", "bq": ",", "Bq": '"',
    "fm": "'", "sd": '"', "no": "!", "mo": "in", "sq": "o", "ci": "O", "dg": "+", "dd": "++",
    "fi": "fi", "fl": "fl", "ff": "ff", "Fi": "ffi", "Fl": "ffl", "~~": "~~", "*D": "Delta",
    "S1": "1", "S2": "2", "S3": "3",
}  # fmt: skip

# Accents as in \('e or \[:u]: the base letter alone is enough for English prose.
ACCENT = re.compile(r"^(?:['`:^~,oa/vhcu-])([A-Za-z])$")
ESCAPE = re.compile(
    r"\\(?:"
    r"(?P<font>f(?:\[[^\]]*\]|\(..|.))"
    r"|(?P<special>\[[^\]]*\]|\(..)"
    r"|(?P<string>\*(?:\[[^\]]*\]|\(..|.))"
    r"|(?P<register>n[+-]?(?:\[[^\]]*\]|\(..|.))"
    r"|(?P<size>s(?:\[[^\]]*\]|'[^']*'|[+-]?\(?\d\d|[+-]?\d))"
    r"|(?P<colour>[mMFVYgO](?:\[[^\]]*\]|\(..|.))"
    r"|(?P<quoted>[hvwXxNoDlLbCABHRSZ](?:'[^']*'|\"[^\"]*\"))"
    r"|(?P<zero>z.)"
    r"|(?P<other>.|$))"
)
SIMPLE = {
    "-": "-", "e": "\\", "\\": "\\", "'": "'", "`": "`", " ": " ", "~": " ", "0": " ", "t": "\t",
    ".": ".", "_": "_",
}  # fmt: skip
ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|[^ \t\\])+)')
CONTROL = re.compile(r"^[.'][ \t]*([^ \t\\\"]{1,20})?[ \t]*(.*)$", re.DOTALL)
COMMENT = re.compile(r'\\["#].*')


def arguments(text: str) -> list[str]:
    """Split a request's arguments: quotes group, ``\\ `` does not separate."""
    found = []
    for match in ARGUMENT.finditer(text):
        quoted, plain = match.groups()
        found.append(plain if plain is not None else quoted.replace('""', '"'))
    return found


class Page:
    """State of one page while it is rendered; ``lines`` is the text so far."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.paragraph: list[str] = []
        self.indent = 0
        self.fill = True
        self.tag: list[str] = []  # output lines that wait for their body
        self.title = ""
        self.section = ""
        self.strings = {"lq": '"', "rq": '"', "R": "(R)", "Tm": "(TM)", "Aq": "'"}
        self.macros: dict[str, list[str]] = {}
        self.mdoc = Mdoc(self)
        self.is_mdoc = False
        self.tag_follows = False
        self.bases: list[int] = []  # indents saved by .RS
        self.base = 0
        self.depth = 0
        self.headed = 0  # how many lines there were after the last heading
        self.link = ""
        self.conditions: list[bool] = []  # of the .ie requests whose .el is still to come

    def text(self, raw: str) -> str:
        """Resolve the escapes of one line or argument."""
        if "\\" not in raw:
            return raw
        return ESCAPE.sub(self._escape, raw)

    def _escape(self, match: re.Match[str]) -> str:
        kind, value = match.lastgroup, match.group()[1:]
        if kind == "special":
            name = value[1:-1] if value[0] == "[" else value[1:]
            if name in SPECIAL:
                return SPECIAL[name]
            if accent := ACCENT.match(name):
                return accent.group(1)
            if re.fullmatch(r"u[0-9A-Fa-f]{4,6}", name):
                code = int(name[1:], 16)
                return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else ""
            return ""
        if kind == "string":
            name = value[2:-1] if value[1] == "[" else value[2:] if value[1] == "(" else value[1:]
            known = self.strings.get(name, "")
            # A string may hold escapes, but one that names itself must not recurse for ever.
            return ESCAPE.sub(self._escape, known.replace("\\*", "")) if "\\" in known else known
        if kind == "register":
            return "0"
        if kind == "quoted":
            inner = value[2:-1]
            if value[0] == "h" and not inner.startswith("-"):
                return " "
            return inner[:1] if value[0] == "o" else ""
        if kind == "zero":
            return value[1:]
        if kind == "other":
            return SIMPLE.get(value, value if value and value not in "&%:/,)|^dupcraku{}!?" else "")
        return ""

    # -- output ---------------------------------------------------------------------------------

    def words(self, text: str) -> None:
        """Add text to the open paragraph, or a line of its own where lines are kept."""
        if not self.fill:
            self.line(text.rstrip())
        elif text[:1] in " \t" and text.strip():
            self.flush()
            self.line(text.rstrip())
        elif text.strip():
            self.paragraph.append(text.strip())
        else:
            self.blank()

    def line(self, text: str) -> None:
        self._tag_out()
        if text or (self.lines and self.lines[-1]):
            self.lines.append(INDENT * self.indent + text if text else "")

    def _tag_out(self) -> None:
        if self.tag:
            tag, self.tag = self.tag, []
            self.lines.extend(INDENT * max(self.indent - 1, 0) + text for text in tag)

    def flush(self) -> None:
        """End the open paragraph."""
        if self.paragraph:
            text = " ".join(self.paragraph)
            self.paragraph = []
            self.line(text)
        elif self.tag:
            self._tag_out()

    def blank(self) -> None:
        self.flush()
        if self.lines and self.lines[-1] and len(self.lines) != self.headed:
            self.lines.append("")

    def heading(self, text: str, level: int) -> None:
        self.blank()
        self.fill, self.indent, self.base, self.bases, self.tag = True, 0, 0, [], []
        self.lines.append("  " * level + text.strip())
        self.indent, self.headed = 1, len(self.lines)

    # -- input ----------------------------------------------------------------------------------

    def feed(self, source: Iterator[str]) -> None:
        for line in source:
            while line.endswith("\\") and not line.endswith("\\\\"):
                line = line[:-1] + next(source, "")
            self.one(line, source)

    def one(self, line: str, source: Iterator[str]) -> None:
        if line[:1] in (".", "'") and (match := CONTROL.match(line)):
            name, rest = match.group(1) or "", match.group(2)
            if name and not line.startswith(("'\\\"", '.\\"')):
                self.request(name, rest, source)
            return
        if "\\" in line:
            line = COMMENT.sub("", line) if '\\"' in line or "\\#" in line else line
            line = self.text(line)
        if self.tag_follows:
            self.tag_follows = False
            self.tag.append(line.strip())
        else:
            self.words(line)

    def request(self, name: str, rest: str, source: Iterator[str]) -> None:
        if '\\"' in rest:
            rest = COMMENT.sub("", rest).rstrip()
        if name in ("if", "ie", "el", "while"):
            self.conditional(name, rest, source)
        elif name in ("de", "de1", "am", "ig", "dei"):
            # The body ends at ".." or at the name given as second argument.
            parts = rest.split()
            end = "." + (parts[1] if name != "ig" and len(parts) > 1 else ".")
            if name == "ig" and parts:
                end = "." + parts[0]
            body = []
            for line in source:
                if line.replace(" ", "") == end:
                    break
                body.append(line)
            if name.startswith("de") and parts:
                self.macros[parts[0]] = body
        elif name in ("ds", "as"):
            key, _, value = rest.partition(" ")
            value = value.lstrip(" ").removeprefix('"')
            self.strings[key] = (self.strings.get(key, "") if name == "as" else "") + value
        elif name in self.macros and name not in ("TH", "SH", "SS", "Dt"):
            if self.depth < 8:
                self.depth += 1
                given = arguments(rest)
                body = [
                    re.sub(
                        r"\\{1,2}\$(\d)",
                        lambda m: given[int(m[1]) - 1] if 0 < int(m[1]) <= len(given) else "",
                        line.replace("\\\\$*", rest),
                    )
                    for line in self.macros[name]
                ]
                self.feed(iter(body))
                self.depth -= 1
        elif name == "TS":
            self.table(source)
        elif name == "EQ":
            for line in source:
                if line.startswith(".EN"):
                    break
        elif name == "so":
            self.link = rest.strip()
        elif name == "Dd":
            self.is_mdoc = True
        elif self.is_mdoc and self.mdoc.known(name):
            self.mdoc.macro(name, rest)
        elif handler := MAN.get(name):
            handler(self, [self.text(argument) for argument in arguments(rest)], name)

    def conditional(self, name: str, rest: str, source: Iterator[str]) -> None:
        """``.if``, ``.ie`` and ``.el``; "n" (a terminal) holds, and registers count as true."""
        if name == "while":
            self._block("", source, rest)
            return
        if name == "el":
            taken = not (self.conditions.pop() if self.conditions else True)
        else:
            rest = rest.lstrip()
            negated = rest.startswith("!")
            if negated:
                rest = rest[1:].lstrip()
            if match := re.match(r"([ntoedrc])(?=[ \t\\.'])\s*", rest):
                taken = match.group(1) in "no"
            elif match := re.match(r"'([^']*)'([^']*)'\s*", rest) or re.match(
                r'"([^"]*)"([^"]*)"\s*', rest
            ):
                taken = self.text(match.group(1)) == self.text(match.group(2))
            elif match := re.match(r"d\s*\S+\s*|r\s*\S+\s*", rest):
                taken = False
            elif match := re.match(r"\(?(?:\\n[+-]?(?:\[[^\]]*\]|\(..|.))\S*\)?\s*", rest):
                taken = ".g" in match.group()
            elif match := re.match(r"\S+\s*", rest):
                taken = match.group().strip() not in ("0", "(0)")
            else:
                taken, match = False, re.match("", rest)
            taken ^= negated
            rest = rest[match.end() :] if match else ""
            if name == "ie":
                self.conditions.append(taken)
        if rest.startswith("\\{"):
            self._block(rest[2:], source, None if taken else "skip")
        elif taken and rest:
            self.one(rest, source)

    def _block(self, first: str, source: Iterator[str], skip: str | None) -> None:
        """Read to the matching ``\\}`` and render it unless it is to be skipped."""
        body, depth = [], 1
        line: str | None = first
        if skip is not None and skip != "skip" and "\\{" not in skip:
            return  # a one-line .while
        while line is not None:
            depth += line.count("\\{") - line.count("\\}")
            if depth <= 0:
                body.append(line.rsplit("\\}", 1)[0])
                break
            body.append(line)
            line = next(source, None)
        if skip is None and self.depth < 20:
            self.depth += 1
            self.feed(iter([line for line in body if line.strip()]))
            self.depth -= 1

    def table(self, source: Iterator[str]) -> None:
        """A ``tbl`` table: one line a row, cells separated by two spaces."""
        self.flush()
        separator, in_format = "\t", True
        cell: list[str] | None = None
        row: list[str] = []
        for number, line in enumerate(source):
            if line.startswith(".TE"):
                break
            if number == 0 and line.rstrip().endswith(";"):
                if match := re.search(r"tab *\((.)\)", line):
                    separator = match.group(1)
                continue
            if in_format:
                in_format = not line.rstrip().endswith(".")
                continue
            if line.startswith(".T&"):
                in_format = True
                continue
            if line.startswith((".", "'")) and cell is None:
                continue
            if cell is not None:
                if not line.startswith("T}"):
                    cell.append(line)
                    continue
                row.append(self._cell(cell))
                cell, line = None, line[2:].removeprefix(separator)
                if not line:
                    self._row(row)
                    row = []
                    continue
            fields = line.split(separator)
            if fields[-1].startswith("T{"):
                cell = []
                fields.pop()
            row += [self.text(field).strip() for field in fields]
            if cell is None:
                self._row(row)
                row = []
        if cell:
            row.append(self._cell(cell))  # a block that the page forgot to close
        self._row(row)

    def _cell(self, source: list[str]) -> str:
        """The text of a ``T{ ... T}`` block, which may hold requests of its own, as one line."""
        page = Page()
        page.strings, page.macros, page.is_mdoc = self.strings, self.macros, self.is_mdoc
        page.feed(iter(source))
        page.flush()
        return " ".join(line.strip() for line in page.lines if line)

    def _row(self, row: list[str]) -> None:
        kept = [field for field in row if field not in ("", "_", "=", "\\_", "\\^", "^")]
        if kept:
            self.line("  ".join(kept))


def render(source: str) -> tuple[str, str, str]:
    """Render a manual page's source; return its title, its section and the text.

    A page that only points at another one (``.so``) gives an empty text.
    """
    page = Page()
    page.feed(iter(source.splitlines()))
    page.flush()
    while page.lines and not page.lines[-1]:
        page.lines.pop()
    text = "\n".join(page.lines).strip("\n")
    if not text:
        return page.title, page.section, ""
    heading = f"{page.title.lower()}({page.section})" if page.title.isupper() else ""
    heading = heading or f"{page.title}({page.section})"
    return page.title, page.section, f"{heading}\n\n{text}"
