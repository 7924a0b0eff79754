"""Cleaning as a datatrove pipeline: every step counts what went in, what came out, and why.

The stages hand files to each other, so the same steps run under datatrove's Slurm and Ray
executors; here they run on the local one, without network and without optional word tokenizers:

1. extract, decode, normalise, filter            one task a shard
2. exact duplicates, MinHash signatures          one task a shard
3. pairs of equal buckets, clusters of pairs     one task a bucket, then one
4. drop near-duplicates, split long documents    one task a shard
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    minhash,
)
from tqdm import tqdm

from thimble.console import progress
from thimble.corpora.duplicates import MINHASH, NotSeen, Signatures
from thimble.corpora.steps import (
    English,
    Extract,
    Load,
    LongEnough,
    Normalise,
    NotBinary,
    Quality,
    Save,
    Split,
    Step,
)

SHARDS = 16


def run(
    work: Path,
    items: list[Any],
    read: Callable[[Any, Counter[str]], Iterator[Any]],
    *,
    english: bool,
    workers: int,
) -> tuple[list[Path], list[dict[str, Any]], dict[str, int]]:
    """Clean the documents of ``items``; returns the shards, the record of the steps, and notes.

    ``read(item, notes)`` yields the documents of one item and may count in ``notes``. The number
    of shards does not depend on ``workers``, so neither does the result.
    """
    tasks = max(1, min(SHARDS, len(items)))
    a, b, c = (str(work / name) for name in ("filtered", "unique", "clean"))
    signatures, buckets, clusters = (
        str(work / name) for name in ("signatures", "buckets", "clusters")
    )
    filters: list[Step] = [NotBinary(), Normalise(), LongEnough()]
    if english:
        filters.append(English())
    filters.append(Quality())
    steps: list[dict[str, Any]] = []
    stages: list[tuple[str, list[PipelineStep], int]] = [
        ("reading and filtering", [Extract(items, read), *filters, Save(a, digests=True)], tasks),
        ("duplicates", [Load(a), NotSeen(a), Save(b), Signatures(signatures)], tasks),
        (
            "near-duplicates",
            [MinhashDedupBuckets(signatures, buckets, config=MINHASH, lines_to_buffer=-1)],
            MINHASH.num_buckets,
        ),
        (
            "clusters of near-duplicates",
            [MinhashDedupCluster(buckets, clusters, config=MINHASH, lines_to_buffer=-1)],
            1,
        ),
        (
            "splitting",
            [Load(b), MinhashDedupFilter(clusters, lines_to_buffer=-1), Split(), Save(c)],
            tasks,
        ),
    ]
    notes: dict[str, int] = {}
    for what, pipeline, count in stages:
        stats = _execute(what, pipeline, count, workers, work / "logs" / what.replace(" ", "-"))
        for step, counted in zip(pipeline, stats.stats, strict=True):
            if isinstance(step, Step):
                totals = {label: int(stat.total) for label, stat in counted.stats.items()}
                if isinstance(step, Extract):
                    notes = {
                        k: v for k, v in totals.items() if k not in ("documents_out", "bytes_out")
                    }
                    totals = {k: v for k, v in totals.items() if k not in notes}
                steps.append({"step": step.name, "why": step.why, **totals})
    before, after = steps[-2], steps[-1]
    steps.insert(
        -1,
        {
            "step": "near-duplicates",
            "why": "about 72 % or more of its runs of five words are a kept document's (MinHash)",
            "documents_in": before["documents_out"],
            "bytes_in": before["bytes_out"],
            "documents_out": after["documents_in"],
            "bytes_out": after["bytes_in"],
        },
    )
    return sorted(Path(c).glob("*.parquet")), steps, notes


def _execute(what: str, pipeline: list[PipelineStep], tasks: int, workers: int, logs: Path) -> Any:
    from loguru import logger

    # Its log of every task goes on in files below ``logs``; progress is shown by us.
    logger.disable("datatrove")
    minhash.tqdm = functools.partial(tqdm, disable=True)
    executor = LocalPipelineExecutor(
        pipeline,
        tasks=tasks,
        workers=max(1, min(workers, tasks)),
        logging_dir=str(logs),
        # Forked workers need no importable main module, so a plain script may call us.
        start_method="fork" if sys.platform == "linux" else "spawn",
    )
    done = threading.Event()
    with progress(what, tasks, "parts") as advance:

        def watch() -> None:
            seen = 0
            while not done.wait(0.3):
                finished = len(list(logs.glob("completions/*")))
                advance(finished - seen)
                seen = finished
            advance(tasks - seen)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            return executor.run()
        finally:
            done.set()
            watcher.join()
