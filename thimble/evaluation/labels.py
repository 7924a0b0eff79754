"""What is known of held-out answers without any model: their size, what counting words makes of
them, and whether a model's figures are too good to be true.

The baselines see what a model sees. A unigram model knows how frequent each token is among the
labels of the training split; a bigram model also knows the token before, which for the first token
of an answer is the last one of its prompt. Kneser-Ney smoothing as in ``ngrams``, here over labels
alone.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from thimble import artifacts
from thimble.console import log
from thimble.errors import DataError
from thimble.evaluation.ngrams import Level, interpolate

if TYPE_CHECKING:
    from thimble.conversations.dataset import Conversations

FORMAT = 1
TRAIN_LABELS = 30_000_000  # counted at most; whole examples, evenly chosen
BLOCK = 1 << 14  # examples looked at in one go
# Of free text no small model answers half word for word, or knows two tokens of three for certain.
MOST_EXACT, LEAST_NLL = 0.5, 0.3

_bytes: weakref.WeakKeyDictionary[Conversations, np.ndarray] = weakref.WeakKeyDictionary()


def answer_bytes(data: Conversations, numbers: np.ndarray) -> np.ndarray:
    """Bytes of the UTF-8 text of all answers of each example: int64 [len(numbers)].

    Counted once for a data set that stays open, so that evaluating again costs no decoding.
    """
    known = _bytes.setdefault(data, np.full(len(data), -1, dtype=np.int64))
    unknown = numbers[known[numbers] < 0]
    if len(unknown):
        tokenizer = data.tokenizer()
        for number in unknown:
            ids, labels = data.example(int(number))
            edges = np.flatnonzero(np.diff(labels.astype(np.int8), prepend=0, append=0))
            answers = [ids[begin:end] for begin, end in edges.reshape(-1, 2)]
            known[number] = sum(
                len(tokenizer.decode(answer[answer != data.end_id].tolist()).encode())
                for answer in answers
            )
    return known[numbers]


# ------------------------------------------------------------------------------------ baselines


def label_baselines(data: Conversations, split: str = "test") -> dict[str, float]:
    """Nats per token and bits per byte of the labels of a split by models that only count.

    ``uniform_nll``, ``unigram_nll``, ``bigram_nll`` and the three ``..._bits_per_byte``, defined as
    in ``recursive``. Kept as ``baselines-<split>.json`` beside the data, good as long as they are
    the same. Raises DataError when a split has no labels.
    """
    path = data.directory / f"baselines-{split}.json"
    key = artifacts.fingerprint([FORMAT, TRAIN_LABELS, split, data.manifest["fingerprint"]])
    if path.is_file():
        kept = artifacts.read_json(path)
        if isinstance(kept, dict) and kept.get("key") == key:
            return kept["figures"]
    held_out = data.split(split)
    before, tokens = pairs(data, held_out)
    train = data.split("train")
    total = int(data.examples["labelled"][train].sum())
    stride = max(1, -(-total // TRAIN_LABELS))
    train_before, train_tokens = pairs(data, train[::stride])
    if not len(tokens) or not len(train_tokens):
        which = "train" if len(tokens) else split
        raise DataError(f"The {which} split of {data.directory} has no labels to count.")
    unigram, bigram = probabilities(train_before, train_tokens, before, tokens, data.vocab_size)
    nats = {
        "uniform": math.log(data.vocab_size),
        "unigram": float(-np.log(unigram).mean()),
        "bigram": float(-np.log(bigram).mean()),
    }
    size = int(answer_bytes(data, held_out).sum())
    figures = {f"{name}_nll": value for name, value in nats.items()}
    if size:
        per_byte = len(tokens) / math.log(2) / size
        figures |= {f"{name}_bits_per_byte": value * per_byte for name, value in nats.items()}
    try:
        artifacts.write_json(path, {"key": key, "tokens": len(tokens), "figures": figures})
    except OSError as error:  # data may be shared and read-only; then it is measured each time
        log.warning("The baselines could not be kept: %s", error)
    return figures


def pairs(data: Conversations, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels of examples, and of each the token before it: int64 [M] and [M]."""
    before, tokens = [], []
    for begin in range(0, len(numbers), BLOCK):
        rows = data.examples[numbers[begin : begin + BLOCK]]
        lengths = rows["length"].astype(np.int64)
        starts = np.repeat(rows["start"] - (np.cumsum(lengths) - lengths), lengths)
        places = starts + np.arange(lengths.sum())
        first = np.zeros(len(places), dtype=bool)
        first[np.cumsum(lengths) - lengths] = True  # nothing stands before it, so no one is asked
        labels = places[data.labels[places].astype(bool) & ~first]
        before.append(data.ids[labels - 1].astype(np.int64))
        tokens.append(data.ids[labels].astype(np.int64))
    none = np.empty(0, dtype=np.int64)
    return np.concatenate([none, *before]), np.concatenate([none, *tokens])


def probabilities(
    train_before: np.ndarray,
    train_tokens: np.ndarray,
    before: np.ndarray,
    tokens: np.ndarray,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """p(token) and p(token | token before), counted on the training pairs: [M] and [M]."""
    codes, counts = np.unique(train_before * vocab_size + train_tokens, return_counts=True)
    words, frequency = np.unique(train_tokens, return_counts=True)
    # Each distinct pair is one distinct predecessor of its second token.
    predecessors = np.bincount(codes % vocab_size, minlength=vocab_size)[words]
    uniform = np.full(len(tokens), 1 / vocab_size)
    zero = np.zeros(1, dtype=np.int64)
    single = Level(words, frequency, predecessors, zero)
    place = _find(words, tokens)
    nothing_before = np.zeros(len(tokens), dtype=np.int64)
    unigram = interpolate(single, frequency, place, nothing_before, uniform)
    lower = interpolate(single, predecessors, place, nothing_before, uniform)
    histories, begins = np.unique(codes // vocab_size, return_index=True)
    double = Level(codes, counts, counts, begins)
    known = _find(codes, before * vocab_size + tokens)
    return unigram, interpolate(double, counts, known, _find(histories, before), lower)


def _find(sorted_values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The place of each wanted value, -1 where it is not there."""
    places = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    return np.where(sorted_values[places] == wanted, places, -1)


# ------------------------------------------------------------------------------------ suspicion


def suspicious(
    figures: Mapping[str, Any], kind: str, checks: Mapping[str, Any] | None = None
) -> list[str]:
    """Why the figures of held-out free text are too good to be believed; empty when they are not.

    ``kind``: that of the data's manifest; puzzles may well be solved. ``checks`` are the data's own
    (``Conversations.checks``): what usually lies behind such figures, with what was measured of it.
    """
    if kind != "conversations":
        return []
    found = []
    if figures["exact_accuracy"] > MOST_EXACT:
        found.append(
            f"{figures['exact_accuracy']:.1%} of the answers are exact, more than {MOST_EXACT:.0%}"
        )
    if figures["nll"] < LEAST_NLL:
        found.append(f"{figures['nll']:.3f} nats a token are less than {LEAST_NLL}")
    if not found:
        return []
    found.append("Free text is not that predictable. Explain it before you believe it:")
    if checks is None:
        return [*found, "  nothing is known of the data; check copies, tokenizer, splits, labels"]
    copy, labels = checks["copy"], checks["labels"]
    coverage, tokenizer, splits = checks["coverage"], checks["tokenizer"], checks["splits"]
    return [
        *found,
        f"  labels that equal their own input: {copy['share']:.1%} (1: nothing was shifted)",
        f"  tokenizer: {tokenizer['vocab_size']:,} entries, {tokenizer['unknown_share']:.2%} "
        f"unknown tokens, {tokenizer['round_trip']:.1%} of the answers come back unchanged",
        f"  labels: {labels['distinct']:,} different tokens, the commonest is "
        f"{labels['majority']:.1%} of them, entropy {labels['unigram_entropy']:.2f} nats",
        f"  splits: {splits['prompts_in_both']:,} prompts and {splits['groups_in_both']:,} groups "
        "are in both",
        f"  coverage: {coverage['mean_labelled']:.1f} labels an example, "
        f"{coverage['examples_without_labels']:,} examples without any",
    ]
