"""``thimble corpus build``: sources, documents, cleaning, mixture, files."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from thimble import artifacts
from thimble.console import log, progress
from thimble.corpora import mixture, recipe
from thimble.corpora.extract import Item, Text, documents
from thimble.corpora.sources import archives, debian

def os_kernel(scale="quick", output=None, seed=1):
    sources, size = recipe.SCALES[scale]
    packages = debian.fetch([s.package for s in sources])
    items = []
    below = debian.cache_folder() / "unpacked"
    seen = set()
    for source in sources:
        package = packages.get(source.package)
        if not package: continue
        folder = archives.unpack(package.path, below, source.wanted())
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            for files in source.files:
                if fnmatch.fnmatchcase(name, files.pattern):
                    digest = artifacts.sha256_file(path)
                    if digest not in seen:
                        seen.add(digest)
                        items.append(Item(str(path), name, files.kind, source.name, files.category, source.licence))
                    break
    log.info("%d files", len(items))
    import pyarrow as pa, pyarrow.parquet as pq
    texts = {}
    import hashlib
    with progress("extracting", len(items), "files") as advance:
        for item in items:
            for t in documents(item):
                if len(t.text) >= 50:
                    texts.setdefault(hashlib.md5(t.text.encode("utf8","surrogateescape")).digest(), t)
            advance(1)
    texts = list(texts.values())
    total = Counter()
    for t in texts: total[t.category] += len(t.text.encode("utf8","surrogateescape"))
    log.info("%s", total)
    kept = mixture.sample(texts, recipe.MIXTURE, size, seed)
    target = Path(output or f"data/corpus/os_kernel-{scale}")
    with artifacts.atomic_directory(target) as folder:
        cols = ["id","text","source","category","licence","group"]
        pq.write_table(pa.table({c:[getattr(t,c) for t in kept] for c in cols}), folder/"documents-00000.parquet", compression="zstd", row_group_size=2000)
        import json
        with open(folder/"conversations.jsonl","w") as f:
            for t in kept:
                if t.conversation: f.write(json.dumps({"conversations":json.loads(t.conversation),"source":t.source,"group":t.group})+"\n")
        by = Counter()
        for t in kept: by[t.category]+=len(t.text.encode())
        artifacts.write_manifest(folder,"corpus",inputs={},options={"scale":scale,"seed":seed,"interim":True},counts={"documents":len(kept),"bytes":sum(by.values())}, by_category=by)
    return target
