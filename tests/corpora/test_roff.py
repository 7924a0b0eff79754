from __future__ import annotations

import random

from thimble.corpora.extract.roff import render

MAN = r"""
.\" a comment
.TH LS 1 "2020-01-01" "GNU"
.SH NAME
ls \- list \fIdirectory\fR contents
.SH SYNOPSIS
.B ls
[\fIOPTION\fR]...
.SH DESCRIPTION
.PP
One line
and another, with a dash \-\- and a quote \(dqhere\(dq.
.TP
\fB\-a\fR, \fB\-\-all\fR
do not ignore entries
.IP \(bu 2
a bullet
.nf
int main(void)
{
    return 0;
}
.fi
.BR open (2),
.BR close (2)
""".strip()


def test_man_page_becomes_compact_text() -> None:
    title, section, text = render(MAN)
    assert (title, section) == ("LS", "1")
    lines = text.split("\n")
    assert lines[0] == "ls(1)"
    assert "    ls - list directory contents" in lines
    assert "    ls [OPTION]..." in lines
    # A paragraph is one line, whatever the lines of its source.
    assert '    One line and another, with a dash -- and a quote "here".' in lines
    assert lines[lines.index("    -a, --all") + 1] == "        do not ignore entries"
    assert "    * a bullet" in lines
    assert "    open(2), close(2)" in lines


def test_verbatim_text_keeps_its_indentation() -> None:
    text = render(MAN)[2]
    assert "    int main(void)\n    {\n        return 0;\n    }\n" in text


def test_mdoc_page() -> None:
    _, section, text = render(
        "\n".join(
            [
                ".Dd January 1, 2020",
                ".Dt KQUEUE 2",
                ".Os",
                ".Sh NAME",
                ".Nm kqueue ,",
                ".Nm kevent",
                ".Nd kernel event notification",
                ".Sh SYNOPSIS",
                ".In sys/event.h",
                ".Ft int",
                '.Fn kevent "int kq" "int n"',
                ".Fo open",
                '.Fa "const char *path"',
                '.Fa "int flags"',
                ".Fc",
                ".Sh DESCRIPTION",
                "The",
                ".Fn kqueue",
                "call takes",
                ".Op Fl a Ar file",
                "and",
                ".Dq quoted text .",
                ".Bl -tag -width x",
                ".It Dv EV_ADD",
                "Adds the",
                ".Ns Va event ,",
                "see",
                ".Xr open 2 .",
                ".El",
                ".Bd -literal -offset indent",
                "struct x {",
                "\tint a;",
                "};",
                ".Ed",
            ]
        )
    )
    assert section == "2"
    assert "    kqueue, kevent - kernel event notification" in text
    assert "    #include <sys/event.h>\n    int\n    kevent(int kq, int n)\n" in text
    assert "open(const char *path, int flags);" in text
    assert 'The kqueue() call takes [-a file] and "quoted text".' in text
    assert "    EV_ADD\n        Adds theevent, see open(2)." in text
    assert "        struct x {\n        \tint a;\n        };" in text


def test_conditions_strings_macros_and_tables() -> None:
    text = render(
        "\n".join(
            [
                ".de Vb",
                ".nf",
                "..",
                ".ds Nm thimble",
                ".TH X 5",
                ".SH NAME",
                ".ie n \\{\\",
                "terminal \\*(Nm",
                ".\\}",
                ".el \\{\\",
                "typesetter",
                ".\\}",
                ".if t .br page",
                ".Vb",
                "  kept   as it is",
                ".fi",
                ".TS",
                "tab(:);",
                "l l.",
                "one:T{",
                "two",
                ".ie n \\{\\",
                "three",
                ".\\}",
                ".el \\{\\",
                ".  sp -1",
                ".\\}",
                "T}",
                ".TE",
                "after",
            ]
        )
    )[2]
    assert "terminal thimble" in text
    assert "typesetter" not in text
    assert "page" not in text
    assert "      kept   as it is" in text
    assert "    one  two three\n" in text
    assert text.endswith("    after")


def test_a_link_to_another_page_gives_nothing() -> None:
    assert render(".so man2/open.2") == ("", "", "")


def test_damaged_pages_neither_fail_nor_hang() -> None:
    choose = random.Random(7)
    noise = [".if n \\{", ".el", ".TE", "T{", ".TS", ".de xx", ".El", ".It", ".RE", ".Fc", "\\*("]
    noise += ["\\[u110000]", ".Op", ".Fn", ".", "\\", ".Dd x", ".\\}", "..", ".ds a \\*a", "\\*a"]
    for _ in range(300):
        lines = MAN.split("\n")
        for _ in range(12):
            lines.insert(choose.randrange(len(lines)), choose.choice(noise))
        assert isinstance(render("\n".join(lines))[2], str)
