"""Continuations of held-out documents, and what can be said of them beside the real ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thimble.console import progress
from thimble.evaluation.degeneration import degeneration, distinct_pairs
from thimble.evaluation.perplexity import choose_documents
from thimble.generation.model import Model
from thimble.tokens.packed_text import PackedText
from thimble.tokens.shards import TokenSplit

Text = TokenSplit | PackedText
PROMPT_TOKENS = 16
SAMPLE_TOKENS = 96
WORD_TOKENS = 2_000_000  # training tokens whose words count as known
WORD = re.compile(r"[A-Za-z]{3,}")


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str  # without the prompt
    problem: str | None


def held_out_samples(
    model: Model, data: Text, count: int, *, temperature: float, top_k: int, seed: int
) -> tuple[list[Sample], list[str]]:
    """Seeded continuations of the beginnings of held-out documents, and the real continuations.

    A prompt is a document's first 16 tokens; both continuations end with the document or after 96
    tokens.
    """
    table = data.documents
    starts, lengths = table.column("start").to_numpy(), table.column("tokens").to_numpy()
    # Of documents that go on for a while after the prompt, where there are such.
    long = np.flatnonzero(lengths >= 4 * PROMPT_TOKENS)
    chosen = np.random.default_rng(seed).permutation(
        long if len(long) else np.arange(len(lengths))
    )[:count]
    context = model.config.max_position_embeddings
    size = min(PROMPT_TOKENS, max(context // 2, 1))
    longest = min(SAMPLE_TOKENS, context - size)
    samples, real = [], []
    with progress("samples", count, "texts") as advance:
        for i in range(count):
            document = int(chosen[i % len(chosen)])
            begin, end = int(starts[document]), int(starts[document] + lengths[document] - 1)
            ids = data.tokens[begin : min(begin + size, end)].tolist()
            prompt = model.tokenizer.decode(ids).rstrip("\ufffd")  # a character cut in half
            text = model.generate(
                prompt, max_tokens=longest, temperature=temperature, top_k=top_k, seed=seed + i
            )
            samples.append(Sample(prompt, text, degeneration(text, model.tokenizer.encode(text))))
            rest = data.tokens[begin + len(ids) : min(begin + len(ids) + longest, end)].tolist()
            real.append(model.tokenizer.decode(rest))
            advance(1)
    return samples, real


def text_figures(
    model: Model, prompts: Sequence[str], texts: Sequence[str], known: frozenset[str]
) -> dict[str, Any]:
    """Length, repetition and coherence of continuations, by heuristics; shares between 0 and 1.

    ``tokens``: mean length. ``degenerate``: texts that are empty, broken or a loop.
    ``distinct_pairs``: pairs of neighbouring tokens that differ from all others of their text.
    ``repeated_fours``: four tokens in a row that stood in the same text before. ``known_words``:
    words, of three letters and more, that the training text has. ``on_topic``: texts that take up a
    word of their prompt, of four letters and more.
    """
    ids = [model.tokenizer.encode(text) for text in texts]
    fours = [list(zip(*(row[i:] for i in range(4)), strict=False)) for row in ids]
    words = [word.lower() for text in texts for word in WORD.findall(text)]
    topic = []
    for prompt, text in zip(prompts, texts, strict=True):
        # The last word of a prompt may be cut in half.
        said = {word.lower() for word in WORD.findall(prompt)[:-1] if len(word) >= 4}
        if said:
            topic.append(bool(said & {word.lower() for word in WORD.findall(text)}))
    return {
        "texts": len(texts),
        "tokens": _mean([len(row) for row in ids]),
        "degenerate": _mean(
            [degeneration(text, row) is not None for text, row in zip(texts, ids, strict=True)]
        ),
        "distinct_pairs": _mean([distinct_pairs(row) for row in ids if len(row) > 1]),
        "repeated_fours": _mean([1 - len(set(row)) / len(row) for row in fours if row]),
        "known_words": _mean([word in known for word in words]),
        "on_topic": _mean(topic),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def known_words(model: Model, train: Text) -> frozenset[str]:
    """The words of an even choice of training documents, two million tokens at most."""
    stream, lengths, *_ = choose_documents(train, WORD_TOKENS)
    found: set[str] = set()
    start = 0
    for end in np.cumsum(lengths):
        text = model.tokenizer.decode(stream[start : end - 1].tolist())
        found.update(word.lower() for word in WORD.findall(text))
        start = end
    return frozenset(found)
