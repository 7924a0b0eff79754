from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from thimble.corpora import questions, recipe
from thimble.corpora.extract import Item, Text, documents, ids, kernel

C_FILE = r"""
// SPDX-License-Identifier: GPL-2.0
/*
 * Copyright (C) 2020 Somebody, All rights reserved.
 */
/**
 * frob_widget - turn the widget until it is frobbed completely
 * @w: the widget
 *
 * Example::
 *
 *	if (ready)
 *		frob_widget(w);
 */
int frob_widget(struct widget *w)
{
	const char *s = "/* this is a string and not a comment, however long it may be */";
	/* short */
	return 0;
}
// These lines belong together because they follow
// each other without anything between them at all.
"""


def test_comments_keep_indentation_and_the_declaration() -> None:
    text = kernel.comments(C_FILE, "drivers/widget.c")
    assert text.startswith("drivers/widget.c\n\n")
    assert "\tif (ready)\n\t\tfrob_widget(w);" in text
    assert "*/\nint frob_widget(struct widget *w)" in text
    assert "follow\neach other" in text
    for absent in ("SPDX", "Copyright", "short", "string and not"):
        assert absent not in text
    assert kernel.comments("int x; /* tiny */", "a.c") == ""


def test_kconfig_entries() -> None:
    source = (
        'menu "Things"\nconfig FROB\n\ttristate "Frob support"\n\tdepends on X86\n\thelp\n'
        "\t  Say Y to frob.\n\n\t  If unsure, say N.\n\nconfig HIDDEN\n\tbool\nendmenu\n"
    )
    [(symbol, prompt, help_, entry)] = kernel.kconfig(source)
    assert (symbol, prompt) == ("FROB", "Frob support")
    assert help_ == "Say Y to frob.\n\nIf unsure, say N."
    assert entry.startswith("config FROB")
    assert "HIDDEN" not in entry


def test_binding() -> None:
    source = (
        "title: Acme thing controller\ndescription: |\n  It controls\n  things.\nproperties:\n"
        "  compatible:\n    oneOf:\n      - const: acme,thing-1\n      - acme,thing-2\n\n  reg:\n"
        "    maxItems: 1\n"
    )
    assert kernel.binding(source) == (
        "Acme thing controller",
        "It controls things.",
        ["acme,thing-1", "acme,thing-2"],
    )


IDS = """\
# comment
10de  NVIDIA
\t0001  First
\t\t1 2  Sub
\t0002  Second
8086  Intel
C 02  Network
\t00  Ethernet
"""


def test_id_files() -> None:
    first, second = ids.vendors(IDS)
    assert (first.id, first.name, first.devices) == (
        "10de",
        "NVIDIA",
        [("0001", "First"), ("0002", "Second")],
    )
    assert len(first.lines) == 4
    assert second.devices == []
    assert list(ids.classes(IDS)) == [("C 02  Network", ["C 02  Network", "\t00  Ethernet"])]
    # Small vendors share a document; none is lost.
    groups = list(ids.grouped([first, second, first], characters=40))
    assert [vendor for group in groups for vendor in group] == [first, second, first]
    assert len(groups) == 2


def item(tmp_path: Path, kind: str, content: bytes, name: str, category: str | None = None) -> Item:
    path = tmp_path / name.replace("/", "_")
    path.write_bytes(content)
    return Item(str(path), name, kind, "test", category, "MIT")


def made(one: Item) -> list[Text]:
    return list(documents(one, Counter()))


def test_answers_state_only_the_source(tmp_path: Path) -> None:
    texts = made(item(tmp_path, "pci", IDS.encode(), "pci.ids"))
    asked = [text for text in texts if text.category == recipe.QA]
    assert asked
    for text in asked:
        turns = json.loads(text.conversation)
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        expected = "\n".join(
            ("Question: " if turn["from"] == "human" else "Answer: ") + turn["value"]
            for turn in turns
        )
        assert text.text == expected
        # Every id and every name in it belongs to one line of the source.
        known = {"PCI:10de": "NVIDIA", "PCI:10de:0001": "First", "PCI:10de:0002": "Second"}
        assert known.get(text.group, "Intel") in text.text


def test_ids_are_unique_and_one_fact_has_one_group(tmp_path: Path) -> None:
    many = "".join(f"{v:04x}  Vendor {v}\n\t0001  Thing {v}\n" for v in range(50))
    texts = made(item(tmp_path, "pci", many.encode(), "pci.ids"))
    assert len({text.id for text in texts}) == len(texts)
    by_group: dict[str, set[str]] = {}
    for text in texts:
        if text.category == recipe.QA:
            by_group.setdefault(text.group, set()).add(text.text)
    assert all(len(by_group[f"PCI:{v:04x}"]) == 2 for v in range(50))


def test_wording_varies_and_is_the_same_each_time() -> None:
    def ask(name: str) -> list[questions.Question]:
        return list(questions.of_manual_page([name], "2", "do a thing", "Linux"))

    assert ask("open") == ask("open")
    kinds = {ask(f"name{n}")[0].turns[0][0].replace(f"name{n}", "") for n in range(40)}
    assert len(kinds) >= 4
    assert any(len(ask(f"name{n}")[0].turns) == 2 for n in range(40))
    for of in range(1, 9):
        assert len(set(questions.pick("x", of, of))) == of


def test_manual_page_category_follows_its_section(tmp_path: Path) -> None:
    for section, category in (("2", "os_code"), ("4", "hardware"), ("8", "administration")):
        page = f".TH X {section}\n.SH NAME\nx, y \\- do it\n".encode()
        first, *rest = made(item(tmp_path, "manual", page, f"man{section}/x.{section}"))
        assert first.category == category
        assert first.prose
        assert {text.group for text in rest} == {f"man:Linux:x({section})"}
        assert {name for name in "xy" if any(f"{name}({section})" in t.text for t in rest)} == {
            "x",
            "y",
        }


def test_latin1_is_read_and_counted(tmp_path: Path) -> None:
    notes: Counter[str] = Counter()
    page = item(tmp_path, "document", "naïve text".encode("latin-1"), "Documentation/a.txt")
    assert next(documents(page, notes)).text == "naïve text"
    assert notes == {"files_read_as_latin1": 1}


def test_kernel_categories() -> None:
    for path, category in {
        "x/Documentation/hwmon/a.rst": "hardware",
        "x/Documentation/admin-guide/a.rst": "administration",
        "x/Documentation/mm/a.rst": "os_code",
        "x/Documentation/networking/device_drivers/a.rst": "hardware",
        "mm/slab.c": "os_code",
        "arch/x86/a.h": "hardware",
        "mm/Kconfig": "administration",
    }.items():
        assert recipe.kernel_category(path) == category
    assert abs(sum(recipe.MIXTURE.values()) - 1) < 1e-9
