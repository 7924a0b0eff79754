from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from tests.helpers_corpora import deb, manual, packages, prose, tar
from thimble import artifacts, corpora
from thimble.errors import ConfigError, DataError, EnvironmentProblem


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THIMBLE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(corpus: Path) -> list[dict[str, str]]:
    return [r for p in sorted(corpus.glob("*.parquet")) for r in parquet.read_table(p).to_pylist()]


def manifest(corpus: Path) -> dict[str, Any]:
    return artifacts.read_manifest(corpus, "corpus", make="")


def build_os_kernel(home: Path, **more: Any) -> Path:
    return corpora.build("os_kernel", sources=[packages(home / "debs")], workers=1, **more)


def test_os_kernel_from_a_folder_of_packages(home: Path) -> None:
    corpus = build_os_kernel(home)
    assert corpus == Path("data/corpus/os_kernel-quick")
    documents, facts = rows(corpus), manifest(corpus)
    assert list(documents[0]) == ["id", "text", "source", "category", "licence", "group"]
    assert len({d["id"] for d in documents}) == len(documents) == facts["counts"]["documents"]
    # The manifest's numbers are those of the files.
    size = sum(len(d["text"].encode()) for d in documents)
    assert facts["counts"]["bytes"] == size
    for table, key in (("by_category", "category"), ("by_source", "source")):
        for name, count in facts[table].items():
            mine = [d for d in documents if d[key] == name]
            assert count["documents"] == len(mine)
            assert count["bytes"] == sum(len(d["text"].encode()) for d in mine)
    for category, share in {
        "os_code": 0.4,
        "hardware": 0.3,
        "administration": 0.2,
        "qa": 0.1,
    }.items():
        assert facts["by_category"][category]["share"] == pytest.approx(share, abs=0.08)
    assert facts["by_source"]["pci.ids"]["licence"] == "GPL-2.0-or-later"
    assert {one["name"] for one in facts["inputs"]} == {
        "pci.ids",
        "manpages",
        "linux-doc-6.1",
        "linux-headers-6.1.0-1-common",
    }
    # Each step goes on with what the one before it left.
    steps = facts["cleaning"]
    for before, after in itertools.pairwise(steps):
        assert after["documents_in"] == before["documents_out"], after["step"]
        assert after["bytes_in"] == before["bytes_out"], after["step"]
    assert steps[-1]["documents_out"] == len(documents)
    # Conversations are the questions of the corpus, one for one.
    talks = [json.loads(line) for line in (corpus / "conversations.jsonl").open()]
    asked = [d["text"] for d in documents if d["category"] == "qa"]
    assert [t["conversations"][0]["value"] for t in talks] == [
        text.split("\n")[0].removeprefix("Question: ") for text in asked
    ]
    assert artifacts.damaged_files(corpus, facts, hashes=True) == []
    assert not list(corpus.parent.glob(".incomplete*"))


def test_same_inputs_same_bytes_and_a_second_run_does_nothing(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = build_os_kernel(home, output=home / "one")
    folder = home / "debs"
    two = corpora.build("os_kernel", sources=[folder], workers=2, output=home / "two")
    other = corpora.build("os_kernel", sources=[folder], workers=2, output=home / "three", seed=2)
    assert manifest(one)["files"] == manifest(two)["files"]
    assert manifest(one)["files"] != manifest(other)["files"]
    stamp = (one / artifacts.MANIFEST).stat().st_mtime_ns
    with caplog.at_level("INFO", logger="thimble"):
        build_os_kernel(home, output=one)
    assert "up to date; nothing to do" in caplog.text
    assert (one / artifacts.MANIFEST).stat().st_mtime_ns == stamp


def test_os_kernel_from_upstream_archives(home: Path) -> None:
    folder = home / "archives"
    folder.mkdir()
    kernel = {
        f"linux-6.12/Documentation/{room}/{n}.rst": prose((room, n), 300).encode()
        for room in ("hwmon", "admin-guide")
        for n in range(9)
    }
    for n in range(9):
        kernel[f"linux-6.12/mm/f{n}.c"] = f"/* {prose(n, 60)} */\nint f{n};\n".encode()
        kernel[f"linux-6.12/drivers/d{n}.c"] = f'MODULE_DESCRIPTION("Driver {n}");\n'.encode()
    (folder / "linux-6.12.tar.xz").write_bytes(tar(kernel))
    page = gzip.decompress(manual("open", 2))
    (folder / "man-pages-6.9.1.tar.xz").write_bytes(tar({"man-pages-6.9.1/man/man2/open.2": page}))
    devices = "".join(f"{n:04x}  Device {n}\n" for n in range(90)).replace("\n", "\n\t")
    (folder / "pci.ids").write_text("10de  NVIDIA Corporation\n\t" + devices.rstrip("\t"))
    corpus = corpora.build("os_kernel", sources=[folder], workers=1)
    facts = manifest(corpus)
    assert set(facts["by_source"]) >= {"linux", "pci.ids"}
    assert facts["by_source"]["linux"]["licence"] == "GPL-2.0-only"
    assert any(d["id"] == "linux/linux-6.12/mm/f1.c" for d in rows(corpus))


def test_duplicates_are_left_out_and_counted(home: Path) -> None:
    words = prose(0, 400).split()
    near = [*words[:200], "changed", *words[201:]]
    texts = [" ".join(words), " ".join(words).upper(), " ".join(near), prose(1, 400), prose(2, 400)]
    (home / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = corpora.build(sources=["a.jsonl"], workers=1)
    steps = {
        s["step"]: s["documents_in"] - s["documents_out"] for s in manifest(corpus)["cleaning"][1:]
    }
    assert steps["exact duplicates"] == 1
    assert steps["near-duplicates"] == 1
    assert len(rows(corpus)) == 3


def test_one_file_is_a_corpus(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (home / "book.txt").write_text("\n\n".join(prose(n) for n in range(250)))
    with caplog.at_level("WARNING", logger="thimble"):
        corpus = corpora.build(sources=["book.txt"], workers=1)
    assert corpus == Path("data/corpus/book")
    assert len({d["group"] for d in rows(corpus)}) > 20
    assert "is very little" in caplog.text
    assert not (corpus / "conversations.jsonl").exists()


def test_a_language_other_than_english_is_the_users_own(home: Path) -> None:
    german = "Der Kern verwaltet den Speicher und die Geräte, Nummer {}. " * 3
    (home / "a.txt").write_text("".join(german.format(n, n, n) for n in range(60)))
    assert rows(corpora.build(sources=["a.txt"], workers=1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "os_kernl"}, ConfigError, "Did you mean os_kernel"),
        ({"name": "os_kernel", "scale": "fulll"}, ConfigError, "Did you mean scale=full"),
        ({}, ConfigError, "--from PATH"),
        ({"name": "os_kernel", "sources": ["empty"]}, DataError, "holds none of the packages"),
        ({"sources": ["tiny.txt"]}, DataError, "(?s)No document is left.*too short: 0 left"),
        ({"sources": ["empty.txt"]}, DataError, "No document is left"),
        ({"sources": ["empty"]}, DataError, "Nothing to read"),
        ({"sources": ["bad.jsonl"]}, DataError, r"bad\.jsonl:1: not JSON"),
    ],
)
def test_bad_input(home: Path, arguments: dict[str, Any], error: type, message: str) -> None:
    (home / "empty").mkdir()
    (home / "tiny.txt").write_text("short")
    (home / "empty.txt").write_text("")
    (home / "bad.jsonl").write_text("{")
    with pytest.raises(error, match=message):
        corpora.build(**{"workers": 2, "output": home / "out", **arguments})
    assert not (home / "out").exists()
    assert not list(home.glob(".incomplete*"))


def test_a_truncated_package_stops_the_build_by_name(home: Path) -> None:
    folder = packages(home / "debs")
    whole = deb(
        "manpages", {f"usr/share/man/man1/{n}.1": prose(n, 900).encode() for n in range(30)}
    )
    (folder / "manpages_1.0_all.deb").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"manpages_1\.0_all\.deb is truncated"):
        corpora.build("os_kernel", sources=[folder], output=home / "out")
    assert not (home / "out").exists()


def test_a_full_disk_leaves_the_old_corpus(home: Path) -> None:
    """Files may not grow past 100 kB here, which looks to a program as a full disk does."""
    (home / "a.txt").write_text(prose(0, 600))
    old = corpora.build(sources=["a.txt"], workers=1, output=home / "out")
    before = manifest(old)
    (home / "a.txt").write_text("\n\n".join(prose(n, 600) for n in range(300)))
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from thimble import corpora\nfrom thimble.errors import EnvironmentProblem\n"
        "try: corpora.build(sources=['a.txt'], workers=1, output='out')\n"
        "except EnvironmentProblem as error: print('said:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=home)
    assert "said: The disk is full" in done.stdout, done.stderr[-2000:]
    assert manifest(old) == before
    assert not list(home.glob(".incomplete*"))


def test_without_apt_and_without_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(EnvironmentProblem, match=r"Could not fetch .* --from FOLDER"):
        corpora.build("os_kernel", output=home / "out")
    assert not (home / "out").exists()
