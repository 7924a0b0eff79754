from __future__ import annotations

import random

import pytest
from datatrove.data import Document

from tests.helpers_corpora import prose
from thimble.corpora import steps


def documents(*texts: str) -> list[Document]:
    return [Document(text, str(n), metadata={"prose": True}) for n, text in enumerate(texts)]


def counts(step: steps.Step) -> dict[str, int]:
    return {label: int(stat.total) for label, stat in step.stats.stats.items()}


def test_normalise_repairs_and_keeps_indentation() -> None:
    raw = "\ufeffa\r\nb\rc \t\n\n\n\n\n\n\tindented\x00\n    four\u00ad\x07 spaces  "
    assert steps.normalise(raw) == "a\nb\nc\n\n\n\tindented\n    four spaces"
    makefile = "all:\n\tcc -o x x.c\n\n    kept"
    assert steps.normalise(makefile) == makefile
    assert steps.normalise("e\u0301") == "é"


def test_normalise_is_idempotent_on_anything() -> None:
    choose = random.Random(3)
    alphabet = "ab \t\n\r\f\x00\x85\u00a0\u200b\u2028é\ud800\ufffd\u0301"
    for _ in range(500):
        once = steps.normalise("".join(choose.choices(alphabet, k=30)))
        assert steps.normalise(once) == once
        once.encode()  # no surrogates remain


@pytest.mark.parametrize(
    ("step", "kept", "dropped"),
    [
        (steps.LongEnough(), "x" * 50, "x" * 49),
        (steps.NotBinary(), "text " * 50 + "\x00", "text \x00\x01\x02" * 10),
        (steps.Quality(), prose(1), "@#$%^&*(" * 40),
        (steps.Quality(), prose(2), "the same line\n" * 50),
        (steps.Quality(), prose(3), "A8f3" * 400),
        (
            steps.English(),
            prose(4),
            "Der Kern des Systems verwaltet den Speicher und die Geräte, und er läuft ohne "
            "Unterbrechung, wenn niemand ihn stört; das gilt auch für die Treiber. " * 4,
        ),
        (steps.English(), prose(5), "内核管理内存和设备，并且不间断地运行。" * 30),
    ],
)
def test_filters_keep_drop_and_count(step: steps.Step, kept: str, dropped: str) -> None:
    assert [d.text for d in step.run(documents(kept, dropped))] == [kept]
    counted = counts(step)
    assert (counted["documents_in"], counted["documents_out"]) == (2, 1)
    assert counted["bytes_in"] - counted["bytes_out"] == len(dropped.encode())


def test_language_judges_prose_only() -> None:
    german = documents("Der Kern des Systems verwaltet den Speicher und die Geräte. " * 9)
    german[0].metadata["prose"] = False
    assert len(list(steps.English().run(german))) == 1


def test_pieces_lose_nothing_and_fit() -> None:
    choose = random.Random(5)
    for _ in range(300):
        limit = choose.randrange(20, 200)
        text = "".join(choose.choices(["word", " ", "\n", "\n\n", ". ", "    x"], k=300))
        parts = steps.pieces(text, limit)
        assert "".join(parts) == text
        assert all(0 < len(part) <= limit for part in parts)


def test_pieces_prefer_the_best_boundary() -> None:
    paragraph = "word " * 15 + "end."
    text = "\n\n".join([paragraph] * 6)
    assert all(part.strip("\n") == paragraph for part in steps.pieces(text, 110))
    # No boundary at all: still cut, still whole.
    assert "".join(steps.pieces("x" * 1000, 64)) == "x" * 1000


def test_split_parts_share_their_group() -> None:
    long = Document("\n\n".join(prose(n) for n in range(200)), "a", metadata={"group": "g"})
    parts = list(steps.Split().run([long]))
    assert len(parts) > 2
    assert {part.metadata["group"] for part in parts} == {"g"}
    assert len({part.id for part in parts}) == len(parts)
    assert all(len(part.text) <= steps.MAXIMUM_CHARACTERS for part in parts)
