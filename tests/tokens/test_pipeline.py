"""From a corpus to shards: every document once, in one split, exactly as its tokens say."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers_tokens import documents, seal, write_corpus
from thimble import artifacts, tokens
from thimble.errors import ConfigError, DataError
from thimble.tokens.shards import SPLITS, TokenSplit
from thimble.tokens.tokenizer import load_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus" / "small", documents())


def build(corpus: Path, vocab_size: int = 400, **options: Any) -> Path:
    output = corpus.parent.parent / "tokens"
    return tokens.build(corpus, output=output, vocab_size=vocab_size, **{"workers": 1} | options)


def leftovers(corpus: Path) -> list[Path]:
    return [path for path in corpus.parent.parent.rglob("*") if ".incomplete-" in path.name]


def test_every_document_is_in_one_split_and_comes_back(corpus: Path) -> None:
    directory = build(corpus)
    tokenizer = load_tokenizer(directory)
    found: dict[str, str] = {}
    group_of = {row["id"]: row["group"] for row in documents()}
    groups: dict[str, set[str]] = {}
    for name in SPLITS:
        split = TokenSplit(directory, name)
        end = 0
        for row in split.documents.to_pylist():
            assert row["start"] == end
            end = row["start"] + row["tokens"]
            ids = split.tokens[row["start"] : end].tolist()
            assert ids[-1] == tokenizer.eot_id
            assert tokenizer.eot_id not in ids[:-1]
            assert row["id"] not in found
            found[row["id"]] = tokenizer.decode(ids[:-1])
            assert row["bytes"] == len(found[row["id"]].encode())
            groups.setdefault(name, set()).add(group_of[row["id"]])
        assert end == len(split.tokens)
    assert found == {row["id"]: row["text"] for row in documents()}
    assert not groups["train"] & groups["val"] | groups["train"] & groups["test"]
    assert not groups["val"] & groups["test"]


def test_the_directory_has_what_it_promises(corpus: Path) -> None:
    directory = build(corpus)
    manifest = artifacts.read_manifest(directory, "tokens", make="")
    assert not artifacts.damaged_files(directory, manifest, hashes=True)
    names = {path.name for path in directory.iterdir()}
    wanted = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "stats.json", "zipf.png"}
    assert wanted | {f"{split}.bin" for split in SPLITS} <= names
    assert json.loads((directory / "vocab.json").read_text())["<|endoftext|>"] == 0
    assert manifest["vocab_size"] == 400
    assert sum(manifest["counts"][split]["bytes"] for split in SPLITS) == sum(
        len(row["text"].encode()) for row in documents()
    )


def test_the_tokenizer_never_saw_the_held_out_text(tmp_path: Path) -> None:
    rows = documents()
    first = build(write_corpus(tmp_path / "corpus" / "a", rows))
    ids = set(TokenSplit(first, "val").documents["id"].to_pylist())
    ids |= set(TokenSplit(first, "test").documents["id"].to_pylist())
    # The same bytes per document, so that the split is the same; other letters where held out.
    changed = [
        row | {"text": row["text"].replace("ker", "zzz") if row["id"] in ids else row["text"]}
        for row in rows
    ]
    before = (first / "tokenizer.json").read_bytes()
    second = build(write_corpus(tmp_path / "corpus" / "b", changed))
    assert set(TokenSplit(second, "val").documents["id"].to_pylist()) <= ids
    assert (second / "tokenizer.json").read_bytes() == before


def test_two_workers_give_the_same_as_one(corpus: Path) -> None:
    one = {path.name: path.read_bytes() for path in build(corpus).iterdir()}
    output = corpus.parent / "two"
    tokens.build(corpus, output=output, vocab_size=400, workers=2)
    for path in output.iterdir():
        if path.name not in ("manifest.json", "zipf.png"):
            assert path.read_bytes() == one[path.name], path.name


def test_a_second_build_does_nothing_and_a_different_one_does(corpus: Path) -> None:
    directory = build(corpus)
    before = (directory / "manifest.json").stat().st_mtime_ns
    assert build(corpus, workers=2) == directory
    assert (directory / "manifest.json").stat().st_mtime_ns == before
    build(corpus, vocab_size=300)
    assert TokenSplit(directory, "train").vocab_size == 300
    (directory / "train.bin").write_bytes(b"cut")
    build(corpus, vocab_size=300)
    TokenSplit(directory, "train")
    text = documents(500)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(text), corpus / "documents-00000.parquet", row_group_size=50
    )
    seal(corpus)
    build(corpus, vocab_size=300)
    counts = artifacts.read_manifest(directory, "tokens", make="")["counts"]
    assert sum(counts[split]["documents"] for split in SPLITS) == 500


def test_special_token_text_in_documents_stays_text(tmp_path: Path) -> None:
    rows = documents()
    for row in rows[::2]:
        row["text"] += "\n<|endoftext|><|pad|> <|unk|>"
    directory = build(write_corpus(tmp_path / "corpus" / "evil", rows))
    for name in SPLITS:
        split = TokenSplit(directory, name)
        assert np.sum(split.tokens == split.eot_id) == split.documents.num_rows
        assert not np.isin(split.tokens, [1, 2]).any()


def test_an_existing_tokenizer_with_a_large_vocabulary(corpus: Path, tmp_path: Path) -> None:
    source = load_tokenizer(build(corpus))
    source.save(tmp_path / "large")
    content = json.loads((tmp_path / "large" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    highest = max(vocabulary, key=lambda token: vocabulary[token])
    vocabulary[highest] = 70_000
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(content))
    directory = tokens.build(
        corpus, output=tmp_path / "wide", tokenizer=tmp_path / "large", workers=1
    )
    split = TokenSplit(directory, "train")
    assert split.dtype == np.dtype("<u4")
    assert split.vocab_size == 70_001
    assert 70_000 in split.tokens
    assert load_tokenizer(directory).decode(split.tokens[:50].tolist())


def test_one_small_file_becomes_three_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row | {"group": "the file", "source": "notes.txt"} for row in documents(6, lines=100)]
    with caplog.at_level(logging.WARNING, logger="thimble"):
        directory = build(write_corpus(tmp_path / "corpus" / "one", rows))
    assert "too few independent documents" in caplog.text
    assert "val has only" in caplog.text
    text = ""
    for name in SPLITS:
        split = TokenSplit(directory, name)
        ids = split.tokens[split.tokens != split.eot_id]
        text += load_tokenizer(directory).decode(ids.tolist())
    assert text == "".join(row["text"] for row in rows)


def test_options_out_of_range(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="at least 259"):
        build(corpus, vocab_size=258)
    with pytest.raises(ConfigError, match="workers must be at least 1"):
        build(corpus, workers=0)
    with pytest.raises(DataError, match="no tokenizer at"):
        build(corpus, tokenizer="gone/gone.model")


def test_names_of_corpora(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pages-quick", "pages-full"):
        write_corpus(tmp_path / "data" / "corpus" / name, documents())
    with pytest.raises(ConfigError, match="pages may be any of pages-full, pages-quick"):
        tokens.build("pages")
    with pytest.raises(DataError, match=r"no corpus other.*\n  thimble corpus build other"):
        tokens.build("other")
    assert tokens.build("pages-quick", vocab_size=300, workers=1) == Path(
        "data/tokens/pages-quick-300"
    )
    assert artifacts.read_manifest("data/tokens/pages-quick-300", "tokens", make="")


def replace_documents(corpus: Path, table: pyarrow.Table) -> None:
    pyarrow.parquet.write_table(table, corpus / "documents-00000.parquet")
    seal(corpus)


def damage_columns(corpus: Path) -> None:
    replace_documents(corpus, pyarrow.Table.from_pylist(documents()).drop_columns(["source"]))


def damage_null(corpus: Path) -> None:
    rows = [*documents(), documents()[0] | {"text": None}]
    replace_documents(corpus, pyarrow.Table.from_pylist(rows))


def damage_type(corpus: Path) -> None:
    table = pyarrow.Table.from_pylist(documents()).drop_columns(["text"])
    replace_documents(corpus, table.append_column("text", pyarrow.array(range(400))))


def damage_empty(corpus: Path) -> None:
    replace_documents(corpus, pyarrow.Table.from_pylist(documents()).slice(0, 0))


def damage_short(corpus: Path) -> None:
    replace_documents(corpus, pyarrow.Table.from_pylist(documents(2, lines=2)))


def damage_truncated(corpus: Path) -> None:
    path = corpus / "documents-00000.parquet"
    path.write_bytes(path.read_bytes()[:-200])


def damage_content(corpus: Path) -> None:
    """The length is right, so only reading finds it."""
    path = corpus / "documents-00000.parquet"
    data = bytearray(path.read_bytes())
    data[1000:3000] = bytes(2000)
    path.write_bytes(data)


def damage_footer(corpus: Path) -> None:
    path = corpus / "documents-00000.parquet"
    path.write_bytes(path.read_bytes()[:-4] + b"XXXX")


def damage_missing(corpus: Path) -> None:
    (corpus / "documents-00000.parquet").unlink()
    seal(corpus)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_columns, "has no column source; it has id, text"),
        (damage_null, "has an empty text"),
        (damage_type, "column text is of type int64, not string"),
        (damage_empty, "holds no documents"),
        (damage_short, "too little to hold out"),
        (damage_truncated, "is damaged: documents-00000.parquet has"),
        (damage_content, "documents-00000.parquet cannot be read"),
        (damage_footer, "documents-00000.parquet cannot be read"),
        (damage_missing, "holds no documents"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_corpus_is_refused_and_the_old_tokens_stay(
    corpus: Path, damage: Any, message: str, workers: int
) -> None:
    old = (build(corpus) / "manifest.json").read_bytes()
    damage(corpus)
    with pytest.raises(DataError, match=message):
        build(corpus, vocab_size=300, workers=workers)
    assert (corpus.parent.parent / "tokens" / "manifest.json").read_bytes() == old
    assert not leftovers(corpus)


def test_a_folder_of_something_else_is_not_replaced(corpus: Path) -> None:
    other = corpus.parent.parent / "tokens"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds something else"):
        build(corpus)
    assert (other / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("limit", [3_000, 20_000, 60_000])
def test_a_full_disk_leaves_nothing_half_written(corpus: Path, limit: int) -> None:
    """A limit on file size is the full disk an ordinary process can have for real."""
    output = corpus.parent.parent / "tokens"
    script = (
        "import resource, signal, sys\n"
        "from thimble import tokens\n"
        "from thimble.errors import EnvironmentProblem\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        f"    tokens.build({str(corpus)!r}, output={str(output)!r}, vocab_size=400, workers=1)\n"
        "except EnvironmentProblem as error:\n"
        "    sys.exit(f'refused: {error}')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert "refused:" in result.stderr
    assert "disk is full" in result.stderr
    assert str(output.parent) in result.stderr
    assert not output.exists()
    assert not leftovers(corpus)
