"""A needle in a haystack: a fact put into held-out text, and asked for at its end.

    text ... The password for anchor is copper window. ... text  The password for anchor is ->

The answer is generated, greedily and from the state alone, and compared exactly. Small models
seldom say two rare words right, so two figures beside it compare the same question with and without
the needle: which of all words of needles it made likelier than any other, and by how many nats it
made the answer likelier. A model that forgot the needle chooses by chance and gains nothing,
whatever else it knows. None of this needs a teacher.
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
TRIALS = 20  # of each depth and length
WORDS = 64  # that needles are made of
FEWEST = 8
LOOKED_AT = 20  # places of a word
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
        """Tokens of the shortest context, its answer included, with as much text as needle."""
        needle = len(self.asked) + len(self.said) + 1 + ANSWER + len(self.end)
        question = len(self.asked) + 1 + len(self.said)
        return len(self.begin) + 2 * needle + question + ANSWER


def make(tokens: np.ndarray, tokenizer: Tokenizer) -> Needles:
    """Needles for a held-out stream of ids [N]. DataError where it has too few whole words.

    The words are of the text, so a model has met them; they are taken out of it, so that there is
    one answer.
    """
    asked, said = tokenizer.encode(ASKED), tokenizer.encode(IS)
    before = len(tokenizer.decode(said))

    def spelled(index: int) -> str:
        return tokenizer.decode([*said, index])[before:]

    ids, counts = np.unique(tokens, return_counts=True)
    found = []
    for index in ids[np.argsort(-counts, kind="stable")].tolist():
        text = spelled(index)
        if not WORD.fullmatch(text) or tokenizer.encode(IS + text) != [*said, index]:
            continue
        # A word, not the beginning of one: what follows it in the text is no letter.
        after = tokens[np.flatnonzero(tokens[:-1] == index)[:LOOKED_AT] + 1]
        if sum(spelled(other)[:1].isalpha() for other in after.tolist()) <= len(after) // 10:
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
    """From a quarter of a model's rows to four times as much, as far as needles have room; where
    they have none, the shortest context with room."""
    fitting = [n for n in doubling(length // 4, 4 * length) if n >= needles.shortest]
    return fitting or [needles.shortest]


@dataclass(frozen=True)
class Rows:
    """Contexts [B, length - ANSWER] and right answers [B, ANSWER]."""

    contexts: np.ndarray
    answers: np.ndarray


def trials(needles: Needles, length: int, depth: float | None, count: int = TRIALS) -> Rows:
    """``count`` contexts of ``length`` tokens, answer included, with their needle at ``depth`` of
    the text, 0 at its beginning; None: without. A trial has the same text and question at every
    depth.

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
        size = length - ANSWER - len(needles.begin) - len(hidden) - len(question)
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

    Of each cell: ``accuracy`` of the generated answers; ``choice``: how often the needle raised the
    answer's first word above all other words of needles (by chance ``chance``); ``nats`` gained by
    the needle; ``first``: a right answer and what was generated. ``without``: the accuracy of the
    same questions without a needle, of each length. A model reads nothing beyond what it was made
    for; those lengths are ``too_long``.
    """
    places: list[float | None] = [None, *DEPTHS]  # first what the others are held against
    readable = {
        name: [n for n in lengths if reader.made_for is None or n <= reader.made_for]
        for name, reader in models.items()
    }
    everything = sum(map(sum, readable.values())) * trials_each * len(places)
    found: dict[str, Any] = {}
    with progress("needles", everything, "tokens") as advance:
        for name, reader in models.items():
            cells, without = [], []
            for length in readable[name]:
                plain: dict[str, np.ndarray] = {}
                for depth in places:
                    rows = trials(needles, length, depth, trials_each)
                    scores = _scores(reader, rows, needles.words)
                    advance(trials_each * length)
                    accuracy = float(scores["right"].mean())
                    if depth is None:
                        plain = scores
                        without.append({"length": length, "accuracy": accuracy})
                        continue
                    raised = (scores["words"] - plain["words"]).argmax(-1)
                    chosen = needles.words[raised] == rows.answers[:, 0]
                    cells.append(
                        {
                            "length": length,
                            "depth": depth,
                            "accuracy": accuracy,
                            "choice": float(chosen.mean()),
                            "nats": float((plain["nats"] - scores["nats"]).mean()),
                            "first": [
                                tokenizer.decode(ids[0].tolist())
                                for ids in (rows.answers, scores["generated"])
                            ],
                        }
                    )
            too_long = [n for n in lengths if n not in readable[name]]
            found[name] = {"cells": cells, "without": without, "too_long": too_long}
    return {
        "lengths": list(lengths),
        "depths": list(DEPTHS),
        "trials": trials_each,
        "chance": 1 / len(needles.words),
        "models": found,
    }


def _scores(reader: Reader, rows: Rows, words: np.ndarray) -> dict[str, np.ndarray]:
    """Of each row what was generated, whether it is right, the nats of the right answer, and the
    logits of all ``words`` where the first one belongs."""
    size = max(BATCH_TOKENS // rows.contexts.shape[1], 1)
    pool = torch.from_numpy(words).to(reader.device)
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(rows.contexts), size):
        here = slice(start, start + size)
        context, right = (
            torch.from_numpy(x[here]).to(reader.device) for x in (rows.contexts, rows.answers)
        )
        said = answer(reader, context, right)
        of_part = {
            "generated": said.generated,
            "right": (said.generated == right).all(-1),
            "nats": said.nats.double(),
            "words": said.first[:, pool].log_softmax(-1),
        }
        for name, values in of_part.items():
            parts.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(each).numpy() for name, each in parts.items()}
