"""The ``mdoc`` macro package (BSD manual pages) for the renderer in ``roff``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thimble.corpora.extract.roff import Page

CLOSING = frozenset(".,:;?!)]")
OPENING = frozenset("([")
PLAIN = frozenset((
    "Ar", "Cm", "Ic", "Va", "Vt", "Fa", "Em", "Sy", "Li", "Ev", "Er", "Dv", "Tn", "An", "Ad", "Ms",
    "No", "Sx", "Cd", "Ft", "Fd", "Pa", "Mt", "Me", "Ux", "Bx", "Fx", "Nx", "Ox", "Dx", "Bsx",
    "At", "St", "Lb", "Lk", "Nm", "Fl", "Xr", "In", "Fn", "Nd", "Ap", "Ns", "Pf", "Tg", "Bt", "Ud",
    "Hf", "%A", "%B", "%C", "%D", "%I", "%J", "%N", "%O", "%P", "%Q", "%R", "%T", "%U", "%V",
))  # fmt: skip
QUOTES = {
    "Op": ("[", "]"), "Dq": ('"', '"'), "Qq": ('"', '"'), "Sq": ("'", "'"), "Ql": ("'", "'"),
    "Pq": ("(", ")"), "Bq": ("[", "]"), "Brq": ("{", "}"), "Aq": ("<", ">"), "Eq": ("", ""),
}  # fmt: skip
OPEN = {
    "Oo": "[", "Do": '"', "Qo": '"', "So": "'", "Po": "(", "Bo": "[", "Bro": "{", "Ao": "<",
    "Xo": "", "Eo": "",
}  # fmt: skip
CLOSE = {
    "Oc": "]", "Dc": '"', "Qc": '"', "Sc": "'", "Pc": ")", "Bc": "]", "Brc": "}", "Ac": ">",
    "Xc": "", "Ec": "",
}  # fmt: skip
SYSTEMS = {
    "Ux": "UNIX", "Bx": "BSD", "Fx": "FreeBSD", "Nx": "NetBSD", "Ox": "OpenBSD",
    "Dx": "DragonFly", "Bsx": "BSD/OS", "At": "AT&T UNIX",
}  # fmt: skip
BLOCKS = frozenset((
    "Dt", "Os", "Sh", "Ss", "Pp", "Lp", "Bl", "It", "El", "Bd", "Ed", "D1", "Dl", "Fo", "Fc", "Rs",
    "Re", "Sm", "Bk", "Ek", "Bf", "Ef", "Rv", "Ex",
))  # fmt: skip
CALLABLE = PLAIN | QUOTES.keys() | OPEN.keys() | CLOSE.keys() | SYSTEMS.keys()
GLUE = "\0"  # no space here


class Mdoc:
    """Renders mdoc macros into the page it belongs to."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.name = ""
        self.heading = ""
        self.lists: list[tuple[str, int, int]] = []  # kind, indent before, number of items
        self.displays: list[tuple[bool, int]] = []
        self.function: list[str] | None = None
        self.reference = False

    @staticmethod
    def known(name: str) -> bool:
        return name in BLOCKS or name in CALLABLE

    def macro(self, name: str, rest: str) -> None:
        from thimble.corpora.extract.roff import arguments

        page = self.page
        given = arguments(rest)
        if name in BLOCKS:
            getattr(self, "_" + name.lower())(given)
            return
        if self.function is not None and name == "Fa":
            self.function.extend(page.text(argument) for argument in given)
            return
        if name == "Nm" and self.heading == "SYNOPSIS":
            page.flush()
        if name in ("Fn", "Ft", "Fd", "In", "Cd", "Vt") and self.heading == "SYNOPSIS":
            page.flush()
            page.words(self.inline([name, *given]))
            if (page.fill and name != "Ft") or page.fill:
                page.flush()
            return
        text = self.inline([name, *given])
        if text.startswith(GLUE) and page.fill and page.paragraph:
            page.paragraph[-1] += text.lstrip(GLUE)
        elif page.paragraph and page.paragraph[-1].endswith(GLUE):
            page.paragraph[-1] = page.paragraph[-1].rstrip(GLUE) + text.lstrip(GLUE)
        elif text:
            page.words(text.lstrip(GLUE))

    def inline(self, tokens: list[str]) -> str:
        """A macro line as text: nested macros, punctuation and spacing resolved."""
        pieces = self._pieces(tokens)
        out = ""
        glue = True
        for piece in pieces:
            if piece == GLUE:
                glue = True
                continue
            if piece in CLOSING or glue or piece in CLOSE_PIECES:
                out += piece.strip(GLUE) if piece in CLOSE_PIECES else piece
            else:
                out += " " + piece
            glue = piece in OPENING or piece in OPEN_PIECES
            out = out.replace("\2", "").replace("\3", "")
        leading = GLUE if pieces[:1] == [GLUE] or (pieces and pieces[0] in CLOSE_PIECES) else ""
        trailing = GLUE if pieces[-1:] == [GLUE] or (pieces and pieces[-1] in OPEN_PIECES) else ""
        return leading + out + trailing

    def _pieces(self, tokens: list[str]) -> list[str]:
        pieces: list[str] = []
        closers: list[str] = []
        position = 0
        while position < len(tokens):
            token = tokens[position]
            position += 1
            if token in QUOTES:
                opening, closing = QUOTES[token]
                pieces.append(opening + "\2")
                closers.append(closing + "\3")
            elif token in OPEN:
                pieces.append(OPEN[token] + "\2")
            elif token in CLOSE:
                pieces.append(CLOSE[token] + "\3")
            elif token in ("Ns", "Ap", "Pf"):
                if token == "Pf" and position < len(tokens):
                    pieces.append(self.page.text(tokens[position]))
                    position += 1
                pieces.append(GLUE)
                if token == "Ap":
                    pieces += ["'", GLUE]
            elif token in CALLABLE:
                given: list[str] = []
                while position < len(tokens) and tokens[position] not in CALLABLE:
                    if tokens[position] in CLOSING:
                        break
                    given.append(self.page.text(tokens[position]))
                    position += 1
                pieces += self._set(token, given)
            elif token in CLOSING and position == len(tokens):
                # Trailing punctuation stands outside the quotes that are open on this line.
                while closers:
                    pieces.append(closers.pop())
                pieces.append(token)
            else:
                pieces.append(self.page.text(token))
        while closers:
            pieces.append(closers.pop())
        return [piece for piece in pieces if piece]

    def _set(self, name: str, given: list[str]) -> list[str]:
        if name == "Fl":
            return ["-" + one if one not in ("|",) else one for one in given] or ["-", GLUE]
        if name == "Ar":
            return given or ["file", "..."]
        if name == "Nm":
            if given and not self.name:
                self.name = given[0]
            return given or [self.name]
        if name == "Nd":
            return ["-", *given]
        if name == "Xr" and given:
            rest = given[2:]
            return [given[0] + (f"({given[1]})" if len(given) > 1 else ""), *rest]
        if name == "In":
            include = "#include " if self.heading == "SYNOPSIS" else ""
            return [f"{include}<{given[0]}>", *given[1:]] if given else []
        if name == "Fd":
            return [" ".join(given)]
        if name == "Fn" and given:
            return [f"{given[0]}({', '.join(given[1:])})"]
        if name == "Lb" and given:
            return [given[0]]
        if name == "St" and given:
            return [given[0].lstrip("-")]
        if name in SYSTEMS:
            return [" ".join([SYSTEMS[name], *given])]
        if name in ("Bt", "Ud"):
            return [
                "is currently in beta test." if name == "Bt" else "currently under development."
            ]
        if name == "An" and given and given[0] in ("-split", "-nosplit"):
            return []
        if name in ("Tg", "Hf"):
            return []
        if name.startswith("%"):
            return [" ".join(given) + ","] if name != "%O" else [" ".join(given)]
        if name == "Li" or name in PLAIN:
            return [one for one in given if one]
        return given

    # -- blocks ---------------------------------------------------------------------------------

    def _dt(self, given: list[str]) -> None:
        self.page.title, self.page.section = [*given, "", ""][:2]

    def _os(self, given: list[str]) -> None:
        pass

    _sm = _bk = _ek = _bf = _ef = _os

    def _sh(self, given: list[str]) -> None:
        self.lists, self.displays = [], []
        self.heading = " ".join(given)
        self.page.heading(self.page.text(self.heading), 0)

    def _ss(self, given: list[str]) -> None:
        self.lists, self.displays = [], []
        self.page.heading(self.inline(given).strip(GLUE), 1)

    def _pp(self, given: list[str]) -> None:
        self.page.blank()

    _lp = _pp

    def _bl(self, given: list[str]) -> None:
        self.page.flush()
        kind = given[0].lstrip("-") if given else "bullet"
        self.lists.append((kind, self.page.indent, 0))

    def _it(self, given: list[str]) -> None:
        page = self.page
        page.flush()
        if not self.lists:
            return
        kind, indent, count = self.lists.pop()
        self.lists.append((kind, indent, count + 1))
        head = self.inline(given).strip(GLUE) if given else ""
        if kind in ("bullet", "dash", "hyphen", "enum", "item"):
            page.indent = indent
            mark = {"enum": f"{count + 1}.", "item": ""}.get(kind, "*")
            if mark:
                page.paragraph.append(mark)
            if head:
                page.paragraph.append(head)
        elif kind == "column":
            page.indent = indent
            cells = re.split(r"\s*(?:\t|\bTa\b)\s*", " ".join(given))
            page.line("  ".join(filter(None, (self.inline(cell.split()) for cell in cells))))
        else:
            if kind in ("tag", "hang", "ohang", "inset", "diag"):
                page.indent = indent + 1
            page.tag.append(head)

    def _el(self, given: list[str]) -> None:
        self.page.flush()
        if self.lists:
            self.page.indent = self.lists.pop()[1]

    def _bd(self, given: list[str]) -> None:
        self.page.flush()
        self.displays.append((self.page.fill, self.page.indent))
        self.page.fill = not ({"-literal", "-unfilled", "-centered"} & set(given))
        if "-offset" in given:
            self.page.indent += 1

    def _ed(self, given: list[str]) -> None:
        self.page.flush()
        if self.displays:
            self.page.fill, self.page.indent = self.displays.pop()

    def _d1(self, given: list[str]) -> None:
        self.page.flush()
        self.page.line("    " + self.inline(given).strip(GLUE))

    _dl = _d1

    def _fo(self, given: list[str]) -> None:
        self.function = [self.page.text(given[0]) if given else ""]

    def _fc(self, given: list[str]) -> None:
        if self.function:
            name, *parameters = self.function
            self.page.words(f"{name}({', '.join(parameters)});")
            self.page.flush()
        self.function = None

    def _rs(self, given: list[str]) -> None:
        self.page.flush()

    _re = _rs

    def _rv(self, given: list[str]) -> None:
        names = [one for one in given if one != "-std"] or [self.name]
        self.page.words(
            f"The {', '.join(names)} function returns 0 on success; otherwise it returns -1 and "
            "sets errno to indicate the error."
        )

    def _ex(self, given: list[str]) -> None:
        names = [one for one in given if one != "-std"] or [self.name]
        self.page.words(f"The {', '.join(names)} utility exits 0 on success, and >0 on an error.")


OPEN_PIECES = frozenset(one + "\2" for one in [*OPEN.values(), *(q[0] for q in QUOTES.values())])
CLOSE_PIECES = frozenset(one + "\3" for one in [*CLOSE.values(), *(q[1] for q in QUOTES.values())])
