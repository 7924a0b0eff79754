"""What shows that labels are honest: measured on the arrays as they are, not on how they were made.

A model can reach a wonderful loss without having learned to answer: when inputs hold the labels,
when a tokenizer knows so few words that every label is the same, when questions of the test split
were trained on, or when hardly anything is labelled. Each function returns the figures of one such
suspicion. All read the tokens block by block, so memory does not grow with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from thimble.conversations.batches import gather
from thimble.conversations.dataset import IGNORED, SPLITS, Conversations
from thimble.tokens.tokenizer import Tokenizer

MAX_COPY_SHARE = 0.1
MAX_UNKNOWN = 0.001  # of the tokens
MAX_MAJORITY = 0.5  # of the labels; one token that is more than half of them is no language
SAMPLE = 4096  # examples
BLOCK = 1 << 22


def check(data: Conversations, tokenizer: Tokenizer, counts: Mapping[str, int]) -> dict[str, Any]:
    """All of them, and under ``suspicious`` what a person should look at before training."""
    found: dict[str, Any] = {
        "copy": copy_share(data),
        "labels": label_statistics(data),
        "coverage": label_coverage(data),
        "tokenizer": tokenizer_fidelity(counts, tokenizer),
        "splits": split_overlap(data),
    }
    suspicious = []
    if found["copy"]["share"] > MAX_COPY_SHARE:
        suspicious.append(f"{found['copy']['share']:.1%} of the labels equal their own input")
    if found["labels"]["majority"] > MAX_MAJORITY:
        suspicious.append(f"one token is {found['labels']['majority']:.1%} of all labels")
    if found["tokenizer"]["round_trip"] < 1:
        suspicious.append(
            f"only {found['tokenizer']['round_trip']:.1%} of the answers come back unchanged "
            "from their tokens"
        )
    if found["splits"]["prompts_in_both"]:
        suspicious.append(f"{found['splits']['prompts_in_both']:,} prompts are in both splits")
    found["suspicious"] = suspicious
    return found


def _blocks(data: Conversations) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels of runs of whole examples."""
    starts = data.examples["start"]
    begin = 0
    while begin < len(data):
        end = int(np.searchsorted(starts, starts[begin] + BLOCK))
        until = int(starts[end]) if end < len(data) else len(data.ids)
        chosen = slice(int(starts[begin]), until)
        yield data.ids[chosen], data.labels[chosen].astype(bool)
        begin = end


def copy_share(data: Conversations) -> dict[str, Any]:
    """How often a label is the very token that stands at its position of the input.

    Measured on examples as a model gets them, drawn evenly. It is how often a token is repeated;
    where the shift was forgotten it is 1.0, and a loss of nothing says nothing.
    """
    same = total = 0
    drawn = np.unique(np.linspace(0, len(data) - 1, min(len(data), SAMPLE)).astype(int))
    for begin in range(0, len(drawn), 64):
        batch = gather(data, drawn[begin : begin + 64])
        same += int(np.sum(batch.inputs == batch.labels))
        total += int(np.sum(batch.labels != IGNORED))
    return {"share": same / max(total, 1), "at_most": MAX_COPY_SHARE, "examples": len(drawn)}


def label_statistics(data: Conversations) -> dict[str, Any]:
    """Entropy of the labels' unigram distribution in nats, and the share of the commonest label.

    The entropy is the loss of a model that knows only how frequent each token is.
    """
    frequency = np.zeros(data.vocab_size, dtype=np.int64)
    for ids, labels in _blocks(data):
        frequency += np.bincount(ids[labels], minlength=data.vocab_size)
    share = frequency[frequency > 0] / max(frequency.sum(), 1)
    return {
        "unigram_entropy": float(-np.sum(share * np.log(share))),
        "majority": float(share.max()) if len(share) else 0.0,
        "majority_id": int(np.argmax(frequency)),
        "at_most": MAX_MAJORITY,
        "distinct": len(share),
    }


def label_coverage(data: Conversations) -> dict[str, Any]:
    """Share of the tokens that are labels, of the examples without any, and lengths in tokens."""
    lengths, labelled = data.examples["length"], data.examples["labelled"]
    return {
        "labelled_share": float(labelled.sum() / max(lengths.sum(), 1)),
        "examples_without_labels": int(np.sum(labelled == 0)),
        "mean_length": float(lengths.mean()),
        "median_length": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "mean_labelled": float(labelled.mean()),
    }


def tokenizer_fidelity(counts: Mapping[str, int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Whether answers come back from their tokens, and the share of unknown tokens.

    ``counts`` are those of the build: a text can be compared only while it is there.
    """
    tried = counts["round_trips"]
    return {
        "vocab_size": tokenizer.vocab_size,
        "unknown_share": counts["unknown"] / max(counts["tokens"], 1),
        "unknown_at_most": MAX_UNKNOWN,
        "round_trip": 1 - counts["round_trips_changed"] / max(tried, 1),
        "round_trip_answers": tried,
    }


def split_overlap(data: Conversations) -> dict[str, Any]:
    """Prompts (up to case and whitespace) and groups in more than one split; has to be none."""
    columns = {"prompts": "text", "groups": "group"}
    parts = [data.examples[data.examples["split"] == place] for place in range(len(SPLITS))]
    return {
        f"{name}_in_both": sum(
            len(np.intersect1d(a[column], b[column])) for a, b in itertools.combinations(parts, 2)
        )
        for name, column in columns.items()
    }
