"""Small corpora in the form that ``thimble tokens build`` reads, made of words drawn at random."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow
import pyarrow.parquet

from thimble import artifacts

SYLLABLES = ("ker", "nel", "mo", "dule", "pci", "dev", "ice", "int", "er", "rupt", "sys", "call")


def sentence(rng: random.Random) -> str:
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(rng.randint(4, 9))]
    return " ".join(words)


def document(rng: random.Random, lines: int) -> str:
    """Lines of words, some indented, some with characters of two to four bytes."""
    extra = ["    ", "\t", "• ", "naïve ", "漢字 ", "🙂 ", "", "", "", ""]
    return "\n".join(rng.choice(extra) + sentence(rng) for _ in range(lines))


def documents(count: int = 400, lines: int = 8, seed: int = 1) -> list[dict[str, str]]:
    """``count`` documents of two sources, three to a group."""
    rng = random.Random(seed)
    return [
        {
            "id": f"doc-{index}",
            "text": document(rng, lines),
            "source": "pages" if index < count // 2 else "code",
            "category": "text",
            "licence": "CC0-1.0",
            "group": f"group-{index // 3}",
        }
        for index in range(count)
    ]


def write_corpus(directory: Path, rows: list[dict[str, str]], *, row_group_size: int = 50) -> Path:
    columns = dict.fromkeys(
        ("id", "text", "source", "category", "licence", "group"), pyarrow.string()
    )
    directory.mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(columns)),
        directory / "documents-00000.parquet",
        compression="zstd",
        row_group_size=row_group_size,
    )
    seal(directory)
    return directory


def seal(directory: Path) -> None:
    """Write the manifest over whatever files are there now."""
    artifacts.write_manifest(directory, "corpus", inputs={}, options={}, counts={})
