"""A needle in a haystack: a fact put into held-out text, and asked for at its end.

    text ... The password for anchor is copper window. ... text  The password for anchor is ->

The answer is generated, greedily and from the state alone, and compared exactly. Small models
seldom say two rare words right, so beside it stands what they would have chosen among all words of
the needles, and how much likelier the right words are than without the needle: nats gained, 0 for a
model that forgot it, whatever else it knows. Nothing here needs a teacher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from thimble.console import progress
from thimble.errors import ConfigError, DataError
from thimble.evaluation.perplexity import BATCH_TOKENS
from thimble.evaluation.reading import Reader, answer, doubling
from thimble.tokens.packing import beginning
from thimble.tokens.tokenizer import Tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIALS = 16  # of each depth and length
WORDS = 64  # that needles are made of
FEWEST = 8
ANSWER = 2  # words
WORD = re.compile(r"\s[a-z]{3,16}")
ASKED = "\nThe password for"
IS = " is"
END = ".\n"


@dataclass(frozen=True)
class Needles:
    """What needles and questions are made of, in ids; the words, each one token, stand nowhere in
    ``text``, the haystack."""

    text: np.ndarray
    words: np.ndarray
    begin: list[int]
    asked: list[int]
    said: list[int]
    end: list[int]

    @property
    def shortest(self) -> int:
        """Tokens of the shortest context, with as much text as needle."""
        needle = len(self.asked) + len(self.said) + 1 + ANSWER + len(self.end)
        question = len(self.asked) + 1 + len(self.said)
        return len(self.begin) + 2 * needle + question


def make(tokens: np.ndarray, tokenizer: Tokenizer) -> Needles:
    """Needles for a held-out stream of ids [N]. DataError where it has too few whole words.

    The words are of the text, so a model has met them; they are taken out of it, so that there is
    one answer.
    """
    ids, counts = np.unique(tokens, return_counts=True)
    asked, said = tokenizer.encode(ASKED), tokenizer.encode(IS)
    before = tokenizer.decode(said)
    found = []
    for index in ids[np.argsort(-counts, kind="stable")].tolist():
        text = tokenizer.decode([*said, index])[len(before) :]
        # A word that is the same token behind whatever stands there.
        if WORD.fullmatch(text) and tokenizer.encode(IS + text) == [*said, index]:
            found.append(index)
    if len(found) < FEWEST:
        raise DataError(
            f"The held-out text has {len(found)} words that are one token of this vocabulary, and "
            f"needles are made of at least {FEWEST}."
        )
    # The commonest words stand in any text; of the others some of every frequency.
    places = np.linspace(min(len(found) // 4, len(found) - FEWEST), len(found) - 1, WORDS)
    words = np.array(found)[np.unique(places.round().astype(np.int64))]
    begin = beginning(tokenizer) or [tokenizer.eot_id]
    out = np.isin(tokens, [*words, *begin, tokenizer.eot_id])
    return Needles(
        np.asarray(tokens)[~out].astype(np.int64),
        words,
        begin,
        asked,
        said,
        tokenizer.encode(END),
    )


def usual_lengths(needles: Needles, length: int) -> Sequence[int]:
    """From a quarter of a model's rows to four times as much, as far as needles have room."""
    return [n for n in doubling(length // 4, 4 * length) if n >= needles.shortest]


@dataclass(frozen=True)
class Rows:
    """Contexts [B, length] and right answers [B, ANSWER]."""

    contexts: np.ndarray
    answers: np.ndarray


def trials(needles: Needles, length: int, depth: float | None, count: int = TRIALS) -> Rows:
    """``count`` contexts of ``length`` tokens with their needle at ``depth`` of the text, 0 at its
    beginning; None: without. A trial has the same text and question at every depth.

    Raises ConfigError for a length in which needle and question have no room.
    """
    if length < needles.shortest:
        raise ConfigError(
            f"A context of {length} tokens has no room for needle and question: at least "
            f"{needles.shortest} with this vocabulary."
        )
    contexts, answers = [], []
    for number in range(count):
        generator = np.random.default_rng([number, length])
        key, *words = generator.choice(needles.words, 1 + ANSWER, replace=False).tolist()
        start = int(generator.integers(len(needles.text)))
        fact = [*needles.asked, key, *needles.said, *words, *needles.end]
        question = [*needles.asked, key, *needles.said]
        hidden = fact if depth is not None else []
        size = length - len(needles.begin) - len(hidden) - len(question)
        text = needles.text.take(np.arange(start, start + size), mode="wrap").tolist()
        place = round((depth or 0.0) * size)
        contexts.append([*needles.begin, *text[:place], *hidden, *text[place:], *question])
        answers.append(words)
    return Rows(np.array(contexts), np.array(answers))


def search(
    models: Mapping[str, Reader],
    needles: Needles,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    *,
    trials_each: int = TRIALS,
) -> dict[str, Any]:
    """All depths and ``lengths`` for each of the ``models``, as JSON.

    Of each cell: ``accuracy`` of the generated answers, ``choice``: how often the right first word
    is the likeliest of all words of needles (by chance ``chance``), ``nats`` gained. ``without``:
    the same contexts without a needle, of each length. A model reads nothing beyond what it was
    made for.
    """
    places: list[float | None] = [*DEPTHS, None]
    everything = sum(
        length * trials_each * len(places)
        for reader in models.values()
        for length in lengths
        if length + ANSWER <= (reader.made_for or length + ANSWER)
    )
    found: dict[str, Any] = {}
    with progress("needles", everything, "tokens") as advance:
        for name, reader in models.items():
            cells, without, too_long = [], [], []
            for length in lengths:
                if reader.made_for is not None and length + ANSWER > reader.made_for:
                    too_long.append(length)
                    continue
                plain: dict[str, Any] = {}
                for depth in reversed(places):  # first without, which the others are held against
                    rows = trials(needles, length, depth, trials_each)
                    scores = _scores(reader, rows, needles.words)
                    advance(rows.contexts.size)
                    figures = {"accuracy": float(scores["right"].mean())}
                    figures["choice"] = float(scores["chosen"].mean())
                    if depth is None:
                        plain = scores
                        without.append({"length": length, **figures})
                        continue
                    gained = plain["nats"] - scores["nats"]
                    figures["nats"] = float(gained.mean())
                    texts = [tokenizer.decode(rows.answers[0]), scores["generated"][0]]
                    texts[1] = tokenizer.decode(texts[1])
                    cells.append({"length": length, "depth": depth, **figures, "first": texts})
            cells.sort(key=lambda cell: (cell["length"], cell["depth"]))
            found[name] = {"cells": cells, "without": without, "too_long": too_long}
    return {
        "lengths": list(lengths),
        "depths": list(DEPTHS),
        "trials": trials_each,
        "chance": 1 / len(needles.words),
        "models": found,
    }


def _scores(reader: Reader, rows: Rows, words: np.ndarray) -> dict[str, Any]:
    """Of each row whether the answer is right, whether its first word is chosen, its nats, ids."""
    size = max(BATCH_TOKENS // rows.contexts.shape[1], 1)
    pool = torch.from_numpy(words).to(reader.device)
    parts: dict[str, list[Any]] = {"right": [], "chosen": [], "nats": [], "generated": []}
    for start in range(0, len(rows.contexts), size):
        here = slice(start, start + size)
        context, right = (
            torch.from_numpy(x[here]).to(reader.device) for x in (rows.contexts, rows.answers)
        )
        said = answer(reader, context, right)
        chosen = pool[said.first[:, pool].argmax(-1)]
        parts["right"].append((said.generated == right).all(-1).cpu())
        parts["chosen"].append((chosen == right[:, 0]).cpu())
        parts["nats"].append(said.nats.double().cpu())
        parts["generated"].append(said.generated.cpu())
    joined = {name: torch.cat(each).numpy() for name, each in parts.items()}
    joined["generated"] = joined["generated"].tolist()
    return joined
