"""Tokenizing and packing: thimble against ``datasets.map`` with the same tokenizer and cores.

    python benchmarks/tokens.py CORPUS [--tokenizer FOLDER] [--workers N] [--rounds N]

Both read the same parquet files and write the same ``.bin``: every document's ids and an
end-of-text token, in order. The two files must be equal to the byte, or there is no table. Each
measurement is a process of its own, from its imports to the closed file; the ways alternate within
a round, so that what else runs on the machine meets all of them. ``datasets.map`` is measured with
one process per core and with the threads of the tokenizer's own library. CPU seconds, of all
processes together, stand beside the time on the clock: others on the machine change them less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = {
    "thimble": "thimble",
    "datasets-processes": "datasets.map, one process per core",
    "datasets-threads": "datasets.map, one process, the library's threads",
}


def run_thimble(corpus: Path, tokenizer: Path, workers: int, out: Path) -> Path:
    import numpy as np

    from thimble import artifacts
    from thimble.tokens import pipeline, splits
    from thimble.tokens.tokenizer import load_tokenizer
    from thimble.workers import process_pool

    groups = pipeline.row_groups(corpus, artifacts.read_manifest(corpus, "corpus", make=""))
    documents = groups[-1].first + groups[-1].rows
    used = load_tokenizer(tokenizer)
    used.save(out)
    all_train = splits.Plan(np.zeros(documents, dtype=np.uint8))
    with process_pool(workers) as pool:
        pipeline.encode(groups, all_train, used, out, pool)
    return out / "train.bin"


def run_datasets(corpus: Path, tokenizer: Path, workers: int | None, out: Path) -> Path:
    import datasets
    import numpy as np
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    used = AutoTokenizer.from_pretrained(tokenizer, split_special_tokens=True)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = used(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"ids": [[*one, used.eos_token_id] for one in ids["input_ids"]]}

    files = sorted(str(file) for file in corpus.glob("documents-*.parquet"))
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", columns=["text"], cache_dir=str(out / "cache")
    )
    done = loaded.map(tokenize, batched=True, remove_columns=["text"], num_proc=workers)
    with open(out / "train.bin", "wb") as file:
        # By whole batches of the Arrow table, the quickest way out of a data set.
        for table in done.with_format("arrow").iter(batch_size=1000):
            flat = table["ids"].combine_chunks().flatten().to_numpy()
            file.write(flat.astype(np.uint16).tobytes())
    return out / "train.bin"


def measure(way: str, corpus: Path, tokenizer: Path, workers: int) -> None:
    """Do it once and print seconds, peak memory in MB and the sha256 of what was written."""
    import hashlib

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        if way == "thimble":
            file = run_thimble(corpus, tokenizer, workers, Path(folder))
        else:
            processes = workers if way == "datasets-processes" else None
            file = run_datasets(corpus, tokenizer, processes, Path(folder))
        seconds = time.perf_counter() - started
        usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        facts = {
            "seconds": seconds,
            "cpu": sum(one.ru_utime + one.ru_stime for one in usage),
            "memory": max(one.ru_maxrss for one in usage) / 1024,
            "tokens": file.stat().st_size // 2,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    print(json.dumps(facts))


def compare(corpus: Path, tokenizer: Path, workers: int, rounds: int) -> str:
    """The table as Markdown. Raises RuntimeError when the ways do not write the same ids."""
    from thimble import artifacts

    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS:
            threads = "false" if way == "datasets-processes" else "true"
            environment = {
                **os.environ,
                "TOKENIZERS_PARALLELISM": threads,
                "RAYON_NUM_THREADS": str(workers),
            }
            command = [sys.executable, __file__, str(corpus), "--tokenizer", str(tokenizer)]
            command += ["--workers", str(workers), "--way", way]
            result = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            found[way].append(json.loads(result.stdout.splitlines()[-1]))
            print(f"round {number + 1}: {way} {found[way][-1]['seconds']:.1f} s", file=sys.stderr)
    if len({one["sha256"] for measured in found.values() for one in measured}) != 1:
        raise RuntimeError("the ways wrote different ids; their times cannot be compared")
    size = sum(text_bytes(file) for file in corpus.glob("documents-*.parquet"))
    median = {
        key: {way: statistics.median(one[key] for one in found[way]) for way in WAYS}
        for key in ("seconds", "cpu")
    }
    packages = artifacts.versions("datasets", "tokenizers", "transformers", "pyarrow")
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    lines = [
        "# Tokenizing and packing against datasets.map",
        "",
        f"{time.strftime('%Y-%m-%d')}, {processor}, {workers} of {os.cpu_count()} cores, "
        f"load {os.getloadavg()[1]:.1f} over five minutes; "
        + ", ".join(f"{name} {version}" for name, version in packages.items())
        + ".",
        "",
        f"`python benchmarks/tokens.py {corpus} --workers {workers} --rounds {rounds}`: "
        f"{size / 1e6:.1f} MB of text, {found['thimble'][0]['tokens']:,} tokens, files equal to "
        "the byte.",
        "",
        "| | s (from, to) | MB/s | CPU s | peak MB of a process | s and CPU s to thimble's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for way, name in WAYS.items():
        seconds = [one["seconds"] for one in found[way]]
        took, cpu = median["seconds"][way], median["cpu"][way]
        lines.append(
            f"| {name} | {took:.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | "
            f"{size / 1e6 / took:.1f} | {cpu:.1f} | "
            f"{max(one['memory'] for one in found[way]):.0f} | "
            f"{took / median['seconds']['thimble']:.1f}x, {cpu / median['cpu']['thimble']:.1f}x |"
        )
    return "\n".join(lines) + "\n"


def text_bytes(file: Path) -> int:
    import pyarrow.compute
    import pyarrow.parquet

    texts = pyarrow.parquet.read_table(file, columns=["text"])["text"]
    return pyarrow.compute.sum(pyarrow.compute.binary_length(texts)).as_py()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="default: one of 4096 trained on the corpus")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the table there as well")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.corpus, options.tokenizer, options.workers)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = options.tokenizer
        if tokenizer is None:
            from thimble import tokens

            tokenizer = tokens.build(options.corpus, output=Path(folder) / "tokens")
        table = compare(options.corpus, tokenizer, options.workers, options.rounds)
    print(table)
    if options.output:
        options.output.write_text(table)


if __name__ == "__main__":
    main()
