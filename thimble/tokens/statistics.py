"""What the tokens are like: ``stats.json``, a Zipf plot, and warnings where it matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from thimble import artifacts
from thimble.console import log
from thimble.tokens.shards import SPLITS
from thimble.tokens.tokenizer import Tokenizer

MIN_BYTES_PER_TOKEN = 3.5
MIN_COVERAGE = 0.8  # of the vocabulary, seen at least once in train
RARE = 10  # occurrences in train; the embedding of a token seen less often hardly learns
FEW_TOKENS = 20_000  # in val; a perplexity on fewer is a rough guess


def write(
    directory: Path,
    tokenizer: Tokenizer,
    counts: dict[str, dict[str, int]],
    frequency: np.ndarray,
    checked: int,
    changed: list[str],
) -> dict[str, Any]:
    """Write stats.json and zipf.png into a directory whose shards are complete; return the former.

    ``frequency``: int64 [vocab_size], how often train has each id. ``checked`` documents were
    decoded again; ``changed`` names those whose text did not come back.
    """
    frequency = frequency.copy()
    frequency[tokenizer.eot_id] = 0  # ours, not the text's
    used = int(np.count_nonzero(frequency))
    undecodable = _undecodable(tokenizer, np.flatnonzero(frequency))
    names = {index: token for token, index in tokenizer.vocabulary().items()}
    order = np.argsort(-frequency, kind="stable")
    text_tokens = counts["train"]["tokens"] - counts["train"]["documents"]
    measured = {
        "bytes_per_token": (counts["train"]["bytes"] / max(text_tokens, 1), MIN_BYTES_PER_TOKEN),
        "coverage": (used / tokenizer.vocab_size, MIN_COVERAGE),
        "decodable": (1 - len(undecodable) / max(used, 1), 1.0),
        "round_trip": (1 - len(changed) / max(checked, 1), 1.0),
    }
    stats = {
        "splits": {
            split: {
                **counts[split],
                "bytes_per_token": counts[split]["bytes"]
                / max(counts[split]["tokens"] - counts[split]["documents"], 1),
                "sources": _by_source(directory / f"{split}.documents.parquet"),
            }
            for split in SPLITS
        },
        "vocabulary": {
            "size": tokenizer.vocab_size,
            "used_in_train": used,
            "rare": int(np.sum((frequency > 0) & (frequency < RARE))),
            "rare_means": f"fewer than {RARE} times in train",
            "most_frequent": [
                [names.get(int(index)), int(frequency[index])] for index in order[: min(20, used)]
            ],
            "undecodable": [names.get(index) for index in undecodable[:20]],
        },
        "zipf_exponent": _plot_zipf(directory / "zipf.png", frequency[order][:used]),
        "round_trip": {"documents": checked, "changed": changed[:20]},
        "thresholds": {
            name: {"value": value, "at_least": least, "met": value >= least}
            for name, (value, least) in measured.items()
        },
        "samples": {split: _sample(directory, split, tokenizer) for split in SPLITS},
    }
    artifacts.write_json(directory / "stats.json", stats)
    _warn(stats, tokenizer)
    return stats


def _warn(stats: dict[str, Any], tokenizer: Tokenizer) -> None:
    advice = {
        "bytes_per_token": "bytes per token: the text is unlike what the tokenizer was made for, "
        "or the vocabulary is small; a larger one makes sequences shorter",
        "coverage": "of the vocabulary occurs in train: the rest stays untrained; a smaller "
        "vocabulary fits this text better",
        "decodable": "of the tokens in use decode to text",
        "round_trip": "of the documents checked came back unchanged from their tokens: this "
        "tokenizer normalizes text, and what it drops cannot be generated",
    }
    for name, threshold in stats["thresholds"].items():
        if not threshold["met"]:
            form = "%.2f" if name == "bytes_per_token" else "%.1f%%"
            scale = 1 if name == "bytes_per_token" else 100
            value, least = (form % (scale * threshold[key]) for key in ("value", "at_least"))
            log.warning("%s (at least %s is wanted) %s", value, least, advice[name])
    for split in ("val", "test"):
        tokens = stats["splits"][split]["tokens"]
        if tokens < FEW_TOKENS:
            log.warning(
                "%s has only %s tokens: its perplexity is a rough guess", split, f"{tokens:,}"
            )


def _undecodable(tokenizer: Tokenizer, ids: np.ndarray) -> list[int]:
    """The ids that add nothing after a letter; some decoders trim the beginning of a text."""
    before = tokenizer.encode("a")
    text = tokenizer.decode(before)
    return [int(i) for i in ids if tokenizer.decode([*before, int(i)]) == text]


def _by_source(file: Path) -> dict[str, dict[str, int]]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file, columns=["source", "tokens", "bytes"])
    sums = table.group_by("source").aggregate(
        [("tokens", "count"), ("tokens", "sum"), ("bytes", "sum")]
    )
    return {
        row["source"]: {
            "documents": row["tokens_count"],
            "tokens": row["tokens_sum"],
            "bytes": row["bytes_sum"],
        }
        for row in sorted(sums.to_pylist(), key=lambda row: row["source"])
    }


def _sample(directory: Path, split: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The beginning of the split's first document, as text and token by token."""
    from thimble.tokens.shards import dtype_for

    ids = np.fromfile(directory / f"{split}.bin", dtype_for(tokenizer.vocab_size), count=40)
    ids = ids[: int(np.argmax(ids == tokenizer.eot_id)) or len(ids)]
    return {
        "text": tokenizer.decode(ids.tolist()),
        "tokens": [tokenizer.decode([index]) for index in ids.tolist()],
    }


def _plot_zipf(file: Path, frequency: np.ndarray) -> float | None:
    """Frequency over rank, both logarithmic; returns the exponent s of frequency ~ rank^-s."""
    from matplotlib.figure import Figure

    rank = np.arange(1, len(frequency) + 1)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(rank, frequency, linewidth=2, color="#2a6f97", label="train")
    exponent = None
    if len(frequency) >= 100:
        # Ranks at even distances on the logarithmic axis, so that the long tail does not outvote
        # the head.
        at = np.unique(np.geomspace(10, len(frequency), 100).astype(int)) - 1
        slope, height = np.polyfit(np.log(rank[at]), np.log(frequency[at]), 1)
        exponent = float(-slope)
        axes.loglog(
            rank, np.exp(height) * rank**slope, "--", color="#888888", label=f"rank^{slope:.2f}"
        )
    axes.set_xlabel("rank of the token")
    axes.set_ylabel("occurrences in train")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    return exponent
