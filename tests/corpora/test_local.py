from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from tests.helpers_corpora import prose
from thimble.corpora import local
from thimble.corpora.extract import Text
from thimble.errors import DataError


def read(path: Path) -> tuple[list[Text], Counter[str]]:
    notes: Counter[str] = Counter()
    return [text for file in local.find([path]) for text in local.documents(file, notes)], notes


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_file_becomes_parts_and_loses_nothing(tmp_path, compress, encoding) -> None:
    text = "\n\n".join(prose(n, 60) + " naïve…" for n in range(300))
    ending = {gzip.compress: ".gz", zstandard.compress: ".zst"}.get(compress, "")
    path = write(tmp_path / f"a.txt{ending}", compress(text.encode(encoding)))
    texts, _ = read(path)
    assert "".join(one.text for one in texts) == text
    assert len(texts) > len(text) / local.PART_CHARACTERS
    assert all(len(one.text) <= local.PART_CHARACTERS for one in texts)
    # Parts can stand in different splits: a single file has to give held-out text too.
    assert len({one.group for one in texts}) == len(texts)
    assert {one.category for one in texts} == {"text"}


def test_utf8_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = local.files.chunks
    monkeypatch.setattr(local.files, "chunks", lambda path: chunks(path, 3))
    text = "äöü€😀" * 40
    assert "".join(one.text for one in read(write(tmp_path / "a.md", text))[0]) == text


def test_records(tmp_path: Path) -> None:
    rows = [
        {"text": "plain text", "license": "MIT", "group": "g1"},
        {"content": "content"},
        {
            "conversations": [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "q1"},
                {"from": "gpt", "value": "a1"},
                {"from": "human", "value": "q2"},
                {"from": "gpt", "value": "a2"},
            ]
        },
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    texts, _ = read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"))
    plain, content, talk, short = texts
    assert (plain.text, plain.licence, plain.group) == ("plain text", "MIT", "g1")
    assert content.text == "content"
    assert talk.text == "be brief\nQuestion: q1\nAnswer: a1\nQuestion: q2\nAnswer: a2"
    assert short.text == "Question: q\nAnswer: a"
    assert short.category == "qa"
    assert json.loads(short.conversation) == [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]


def test_parquet(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert [one.text for one in read(tmp_path / "a.parquet")[0]] == ["one", "two"]


def test_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "x/b.txt", "b")
    write(tmp_path / "x/deep/a.md", "a")
    write(tmp_path / "x/picture.png", "no")
    write(tmp_path / "x/.hidden/c.txt", "no")
    with caplog.at_level("WARNING", logger="thimble"):
        files = local.find([tmp_path / "x"])
    assert [file.name for file in files] == ["x/b.txt", "x/deep/a.md"]
    assert "1 files of other kinds are left out: .png (1)" in caplog.text
    # The same name from two folders stays two files.
    other = write(tmp_path / "y/b.txt", "other")
    assert len({file.name for file in local.find([tmp_path / "x/b.txt", other])}) == 2


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.zst", "A.PARQUET"])
def test_stem(tmp_path: Path, name: str) -> None:
    assert local.stem(write(tmp_path / name, "")) == name[0]
    assert local.stem(tmp_path) == tmp_path.name


def test_few_broken_lines_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps({"text": f"text {n}"}) for n in range(300)]
    lines[6] = '{"text": "cut off'
    lines[9] = '{"title": "no text"}'
    with caplog.at_level("WARNING", logger="thimble"):
        texts, notes = read(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert len(texts) == 298
    assert notes[local.REFUSED] == 2
    assert "a.jsonl:7: not JSON" in caplog.text
    assert "a.jsonl:10: no text" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"1 of 2 records .*a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b"[1, 2]\n", r"a\.jsonl:1: not an object"),
        ("a.jsonl", b'{"conversations": [{"from": "dog", "value": "x"}]}', r"a turn by 'dog'"),
        ("a.txt", b"fine until here \xff\xfe", r"a\.txt is not UTF-8: .* at byte 16"),
        ("a.txt.gz", gzip.compress(prose(1, 9000).encode())[:-20], "a.txt.gz is truncated"),
        ("a.txt.gz", b"no gzip at all", "a.txt.gz is truncated or damaged"),
        ("a.txt.zst", zstandard.compress(prose(1, 9000).encode())[:-20], "a.txt.zst is truncated"),
        ("a.jsonl.zst", b"no zstd at all", "a.jsonl.zst is truncated or damaged"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet is truncated or damaged"),
        ("a.docx", b"x", "Nothing to read .* Known kinds are .txt"),
    ],
)
def test_bad_files_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match="(?s)" + message):
        read(path)


def test_a_truncated_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [prose(n) for n in range(200)]}), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.parquet is truncated or damaged"):
        read(path)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        local.find([tmp_path / "nowhere.txt"])
