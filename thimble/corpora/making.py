"""From sources to a corpus folder: find the files, clean their documents, mix, write."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from thimble import artifacts
from thimble.console import log, progress
from thimble.corpora import local, mixture, recipe
from thimble.corpora.extract import Item, documents
from thimble.corpora.sources import archives, debian, upstream
from thimble.errors import ConfigError, DataError, nearest

NAMES = ("os_kernel",)
COLUMNS = ("id", "text", "source", "category", "licence", "group")
ROW_GROUP_BYTES = 4_000_000
FILE_BYTES = 256_000_000
MAKE = "thimble corpus build os_kernel"


def build(
    name: str | None,
    *,
    sources: Sequence[str | Path],
    scale: str,
    output: str | Path | None,
    workers: int | None,
    seed: int,
) -> Path:
    """See ``thimble.corpora.build``."""
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", None)
        workers = len(affinity(0)) if affinity else os.cpu_count() or 1
    if name is None:
        if not sources:
            raise ConfigError(f"Name a corpus ({', '.join(NAMES)}) or give files with --from PATH.")
        return _from_user(sources, output, workers)
    if name not in NAMES:
        raise ConfigError(
            f"There is no corpus {name!r}. Did you mean {nearest(name, NAMES) or NAMES[0]}? "
            "For files of your own: thimble corpus build --from PATH"
        )
    if scale not in recipe.SCALES:
        close = nearest(scale, recipe.SCALES) or "quick"
        raise ConfigError(f"There is no scale {scale!r}. Did you mean scale={close}?")
    return _os_kernel(sources, scale, output, workers, seed)


def _from_user(sources: Sequence[str | Path], output: str | Path | None, workers: int) -> Path:
    files = local.find(sources)
    target = Path(output or Path("data/corpus") / local.stem(sources[0]))
    inputs = [{"name": file.name, "sha256": artifacts.sha256_file(file.path)} for file in files]
    options = {"part_characters": local.PART_CHARACTERS}
    if _current(target, inputs, options):
        return target
    with artifacts.atomic_directory(target) as folder:
        cleaned = _clean(folder, files, local.documents, english=False, workers=workers)
        _write(folder, cleaned, None, {}, inputs=inputs, options=options)
    return _said(target)


def _os_kernel(
    local_folders: Sequence[str | Path],
    scale: str,
    output: str | Path | None,
    workers: int,
    seed: int,
) -> Path:
    wanted, limit = recipe.SCALES[scale]
    packages = _packages(wanted, local_folders)
    target = Path(output or f"data/corpus/os_kernel-{scale}")
    inputs = [packages[key].facts() for key in sorted(packages)]
    options = {
        "name": "os_kernel",
        "recipe": recipe.VERSION,
        "scale": scale,
        "seed": seed,
        "bytes_at_most": limit,
        "mixture": recipe.MIXTURE,
    }
    if _current(target, inputs, options):
        return target
    items, facts = _items(wanted, packages)
    with artifacts.atomic_directory(target) as folder:
        cleaned = _clean(folder, items, documents, english=True, workers=workers)
        groups = _groups(cleaned.shards)
        chosen, available = mixture.choose(groups, recipe.MIXTURE, limit, seed)
        cleaned.steps.append({"step": "mixture", "why": _why_mixture(limit, available)})
        _write(folder, cleaned, chosen, facts, inputs=inputs, options=options)
    return _said(target)


def _why_mixture(limit: int | None, available: Mapping[str, int]) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in recipe.MIXTURE.items())
    there = ", ".join(f"{name} {size:,}" for name, size in available.items())
    least = min(recipe.MIXTURE, key=lambda name: available[name] / recipe.MIXTURE[name])
    bound = f"at most {limit:,} bytes" if limit else f"as many bytes as {least} allows"
    return f"sampled by group to {shares}, {bound}; there were {there} bytes"


def _packages(
    wanted: Iterable[recipe.Source], folders: Sequence[str | Path]
) -> dict[str, debian.Package]:
    """The archives of a recipe by the pattern of their source."""
    patterns = [source.package for source in wanted]
    if folders:
        found: dict[str, debian.Package] = {}
        for folder in map(Path, folders):
            if not folder.is_dir():
                raise DataError(f"{folder} is not a folder of packages or archives.")
            found |= debian.in_folder(folder, patterns) | upstream.in_folder(folder)
        if not found:
            raise DataError(
                f"{', '.join(map(str, folders))} holds none of the packages os_kernel is made of. "
                "Fetch them on a machine with apt: their names are in thimble/corpora/recipe.py."
            )
        return found
    if not debian.available():
        return upstream.fetch()
    found = debian.fetch(patterns)
    if descriptions := debian.descriptions():
        found[descriptions.name] = descriptions
    return found


def _items(
    wanted: Iterable[recipe.Source], packages: Mapping[str, debian.Package]
) -> tuple[list[Item], dict[str, dict[str, str]]]:
    """The files to be read, each content once, and what is known of each source."""
    below = debian.cache_folder() / "unpacked"
    items: list[Item] = []
    facts: dict[str, dict[str, str]] = {}
    seen: set[bytes] = set()
    sources = [source for source in (*wanted, *recipe.UPSTREAM) if source.package in packages]
    with progress("unpacking", len(sources), "packages") as advance:
        for source in sources:
            package = packages[source.package]
            folder = archives.unpack(package.path, package.sha256, below, source.wanted())
            licence = source.licence or _licence(folder, package, packages.values(), below)
            facts[source.name] = {"licence": licence, **package.facts()}
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                name = path.relative_to(folder).as_posix()
                files = next(
                    (f for f in source.files if fnmatch.fnmatchcase(name, f.pattern)), None
                )
                # Some packages carry one page under many names, as copies.
                if not files or not source.takes(name):
                    continue
                if (content := _content(path)) not in seen:
                    seen.add(content)
                    short = name.removeprefix("usr/share/").removeprefix("usr/src/")
                    items.append(
                        Item(str(path), short, files.kind, source.name, files.category, licence)
                    )
            advance(1)
    if listed := packages.get("package-descriptions"):
        facts[listed.name] = {"licence": "unknown", **listed.facts()}
        items.append(
            Item(str(listed.path), listed.path.name, "descriptions", listed.name, None, "unknown")
        )
    return items, facts


def _content(path: Path) -> bytes:
    import hashlib

    return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


def _licence(
    folder: Path, package: debian.Package, packages: Iterable[debian.Package], below: Path
) -> str:
    """The licence in a package's copyright file, or in that of one built from the same source.

    Packages of one source often hold a link to the folder of another one.
    """
    for path in sorted(folder.glob("usr/share/doc/*/copyright")):
        return debian.licence_of(path.read_text(encoding="utf-8", errors="replace"))
    if package.path.suffix != ".deb":
        return "unknown"
    origin = debian.source_of(package)
    for other in packages:
        if (
            other is not package
            and other.path.suffix == ".deb"
            and debian.source_of(other) == origin
        ):
            wanted = ("usr/share/doc/*/copyright",)
            one = archives.unpack(other.path, other.sha256, below, wanted)
            for path in sorted(one.glob("usr/share/doc/*/copyright")):
                return debian.licence_of(path.read_text(encoding="utf-8", errors="replace"))
    return "unknown"


class Cleaned:
    """What cleaning gave: its shards, the record of its steps, and counts of what it noticed."""

    def __init__(self, shards: list[Path], steps: list[dict[str, Any]], notes: dict[str, int]):
        self.shards, self.steps, self.notes = shards, steps, notes


def _clean(folder: Path, items: list[Any], read: Any, *, english: bool, workers: int) -> Cleaned:
    from thimble.corpora import clean

    work = folder / "work"
    cleaned = Cleaned(*clean.run(work, items, read, english=english, workers=workers))
    for step in cleaned.steps:
        lost = step.get("documents_in", 0) - step["documents_out"]
        if lost > 0:
            log.info("%s: %d of %d documents left out", step["step"], lost, step["documents_in"])
    if not cleaned.steps[-1]["documents_out"]:
        raise DataError(
            "No document is left after cleaning:\n"
            + "\n".join(
                f"  {s['step']}: {s['documents_out']} left ({s['why']})" for s in cleaned.steps
            )
        )
    return cleaned


def _groups(shards: Iterable[Path]) -> Iterator[tuple[str, str, int]]:
    from thimble.corpora.steps import rows_of, utf8_length

    for shard in shards:
        for row in rows_of(shard, ("category", "group", "text")):
            yield row["category"], row["group"], utf8_length(row["text"])


def _write(
    folder: Path,
    cleaned: Cleaned,
    chosen: Mapping[str, set[str]] | None,
    facts: Mapping[str, Mapping[str, str]],
    *,
    inputs: Any,
    options: Mapping[str, Any],
) -> None:
    """Write the chosen documents, their conversations and the manifest; remove the work folder."""
    import pyarrow as pa
    from pyarrow import parquet

    from thimble.corpora.steps import rows_of, utf8_length

    schema = pa.schema([(column, pa.string()) for column in COLUMNS])
    categories: dict[str, Counter[str]] = {}
    sources: dict[str, Counter[str]] = {}
    licences: dict[str, str] = {}
    counts: Counter[str] = Counter(documents=0, bytes=0, conversations=0)
    writer, pending, written = None, 0, 0
    rows: list[dict[str, Any]] = []
    part = 0

    def flush(close: bool) -> None:
        nonlocal writer, rows, pending, written, part
        if rows:
            if writer is None:
                path = folder / f"documents-{part:05d}.parquet"
                writer = parquet.ParquetWriter(path, schema, compression="zstd")
            writer.write_table(pa.Table.from_pylist(rows, schema))
            written += pending
            rows, pending = [], 0
        if writer and (close or written > FILE_BYTES):
            writer.close()
            writer, written, part = None, 0, part + 1

    with open(folder / "conversations.jsonl", "w", encoding="utf-8") as conversations:
        for shard in cleaned.shards:
            for row in rows_of(shard):
                if chosen is not None and row["group"] not in chosen[row["category"]]:
                    continue
                size = utf8_length(row["text"])
                for table, key in ((categories, row["category"]), (sources, row["source"])):
                    table.setdefault(key, Counter()).update(documents=1, bytes=size)
                licences[row["source"]] = row["licence"]
                counts.update(documents=1, bytes=size)
                if row["conversation"]:
                    record = {
                        "conversations": json.loads(row["conversation"]),
                        "source": row["source"],
                        "group": row["group"],
                    }
                    conversations.write(json.dumps(record, ensure_ascii=False) + "\n")
                    counts["conversations"] += 1
                rows.append({column: row[column] for column in COLUMNS})
                pending += size
                if pending > ROW_GROUP_BYTES:
                    flush(close=False)
    flush(close=True)
    if not counts["conversations"]:
        (folder / "conversations.jsonl").unlink()
    shutil.rmtree(folder / "work")
    if cleaned.steps[-1]["step"] == "mixture":
        before = cleaned.steps[-2]
        cleaned.steps[-1] |= {
            "documents_in": before["documents_out"],
            "bytes_in": before["bytes_out"],
            "documents_out": counts["documents"],
            "bytes_out": counts["bytes"],
        }
    artifacts.write_manifest(
        folder,
        "corpus",
        inputs=inputs,
        options=options,
        counts={**counts, **cleaned.notes},
        packages=("datatrove", "pyarrow", "py3langid"),
        by_category={
            name: {**count, "share": round(count["bytes"] / max(counts["bytes"], 1), 4)}
            for name, count in sorted(categories.items())
        },
        by_source={
            name: {**count, "licence": licences[name], **facts.get(name, {})}
            for name, count in sorted(sources.items())
        },
        cleaning=cleaned.steps,
    )


def _current(target: Path, inputs: Any, options: Mapping[str, Any]) -> bool:
    current = artifacts.is_current(target, "corpus", inputs, options)
    if current:
        log.info("%s is up to date; nothing to do.", target)
    return current


def _said(target: Path) -> Path:
    counts = artifacts.read_manifest(target, "corpus", make=MAKE)["counts"]
    log.info("%s: %s documents, %.1f MB", target, f"{counts['documents']:,}", counts["bytes"] / 1e6)
    if counts["bytes"] < 1_000_000:
        log.warning(
            "%.0f kB of text is very little: a model will learn its letters and commonest words, "
            "not its language. The corpus os_kernel has 28,000 kB.",
            counts["bytes"] / 1e3,
        )
    return target
