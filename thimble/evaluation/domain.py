"""The operating-system benchmark: four skills, up to 100 multiple-choice items each.

An item asks for a held-out fact: a device, a binding, a command or a package of which no training
document was made. That alone proves little, since the same words may stand in another document; so
a fact whose defining words occur anywhere in the training text, in whatever case and however broken
into lines, is left out, and how many were is part of the result. The test split comes first; where
it has too few facts, the validation split, which was not trained on either, fills up.

Each item offers four answers of one form. The wrong ones are the answers of other held-out facts,
so the right one is not the only one the model has never read. The model chooses the answer with the
highest likelihood per byte.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thimble import artifacts
from thimble.console import log, progress
from thimble.corpora.facts import SKILLS, Fact, fact_of
from thimble.errors import DataError
from thimble.generation.model import Model
from thimble.tokens.shards import TokenSplit, corpus_of
from thimble.tokens.splits import normalized

FORMAT = 3
FILE = "benchmark.json"
ITEMS = 100  # of each skill
POOL = 200  # unseen facts of each skill, whose answers are offered
CHOICES = 4
SEED = 1
QUESTIONS = "qa"  # the category of the questions in a corpus
BATCH_TOKENS = 8192
IGNORED = -100


@dataclass(frozen=True)
class Item:
    skill: str
    key: str
    split: str
    prompt: str
    choices: list[str]
    answer: int  # index of the right choice


def benchmark(tokens: str | Path) -> dict[str, Any]:
    """The benchmark of a tokens directory, made once and kept beside it as ``benchmark.json``.

    Returns ``items`` (as ``Item``) and for each skill in ``skills`` how many ``facts`` are held
    out, how many were looked for and found ``in_training_text``, and how many ``items`` were made.
    Raises DataError when the corpus is not there, is another one, has no such questions, or too few
    whose words the training text does not have.
    """
    test, val = TokenSplit(tokens, "test"), TokenSplit(tokens, "val")
    directory = test.directory
    key = artifacts.fingerprint([FORMAT, ITEMS, CHOICES, SEED, test.manifest["fingerprint"]])
    path = directory / FILE
    kept = artifacts.read_json(path) if path.is_file() else {}
    if kept.get("key") != key:
        kept = {"key": key, **_make(directory, test, val)}
        try:
            artifacts.write_json(path, kept)
        except OSError as error:  # tokens may be shared and read-only; then it is made each time
            log.warning("The benchmark could not be kept: %s", error)
    if not kept["items"]:
        held_out = sum(skill["facts"] for skill in kept["skills"].values())
        raise DataError(
            f"{kept['corpus']} holds out {held_out} such facts: too few that the training text "
            "does not have and that have wrong answers of their form."
        )
    return {**kept, "items": [Item(**item) for item in kept["items"]]}


def _make(directory: Path, test: TokenSplit, val: TokenSplit) -> dict[str, Any]:
    corpus = corpus_of(directory, test.manifest)
    if corpus is None:
        name = test.manifest["inputs"]["corpus"]["name"]
        raise DataError(
            f"The corpus {name} that {directory} was made from is not there any more, and the "
            "benchmark is made from its questions. Build it again with thimble corpus build."
        )
    split_of = dict.fromkeys(val.documents.column("id").to_pylist(), "val")
    split_of |= dict.fromkeys(test.documents.column("id").to_pylist(), "test")
    facts: dict[str, tuple[str, Fact]] = {}
    training: list[str] = []
    rows = sum(1 for _ in corpus.glob("*.parquet"))
    with progress("benchmark: reading the corpus", rows, "files") as advance:
        for document in _documents(corpus, advance):
            split = split_of.get(document["id"])
            if split is None:
                training.append(normalized(document["text"]))
            elif document["category"] == QUESTIONS:
                fact = fact_of(document["text"], document["group"])
                if fact and facts.get(fact.key, ("val",))[0] == "val":
                    facts[fact.key] = (split, fact)
    if not facts:
        raise DataError(f"{corpus} has no held-out questions that the benchmark could be made of.")
    text = "\n".join(training).encode()  # bytes are searched twice as fast as characters
    items: list[Item] = []
    skills: dict[str, dict[str, int]] = {}
    with progress("benchmark: searching the training text", None, "facts") as advance:
        for skill in SKILLS:
            mine = in_order(skill, facts.values())
            unseen: list[tuple[str, Fact]] = []
            known = 0
            for split, fact in mine:
                if len(unseen) == POOL:
                    break
                if normalized(fact.proof).encode() in text:
                    known += 1
                else:
                    unseen.append((split, fact))
                advance(1)
            made = make_items(skill, unseen)
            items += made
            skills[skill] = {
                "facts": len(mine),
                "facts_looked_for": known + len(unseen),
                "in_training_text": known,
                "items": len(made),
                "items_of_test": sum(item.split == "test" for item in made),
            }
    return {
        "corpus": corpus.name,
        "training_bytes": len(text),
        "skills": skills,
        "items": [asdict(item) for item in items],
    }


def _documents(corpus: Path, advance: Any) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    columns = ["id", "text", "category", "group"]
    for file in sorted(corpus.glob("*.parquet")):
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024, columns=columns):
            yield from batch.to_pylist()
        advance(1)


def in_order(skill: str, facts: Iterable[tuple[str, Fact]]) -> list[tuple[str, Fact]]:
    """A skill's facts in their order of use: shuffled, always alike, the test split first."""
    mine = sorted((f for f in facts if f[1].skill == skill), key=lambda f: f[1].key)
    random.Random(f"{SEED} {skill}").shuffle(mine)
    return sorted(mine, key=lambda f: f[0] != "test")


def make_items(skill: str, facts: Sequence[tuple[str, Fact]]) -> list[Item]:
    """The first ``ITEMS`` facts that have enough wrong answers of their form, as items."""
    generator = random.Random(f"{SEED} {skill} choices")
    items: list[Item] = []
    for split, fact in facts:
        others = {f.answer for _, f in facts if f.form == fact.form} - {fact.answer}
        if len(others) < CHOICES - 1 or len(items) == ITEMS:
            continue
        choices = [*generator.sample(sorted(others), CHOICES - 1), fact.answer]
        generator.shuffle(choices)
        place = choices.index(fact.answer)
        items.append(Item(skill, fact.key, split, fact.prompt, choices, place))
    return items


def score(model: Model, made: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of a model on each skill and on all items, with what needs no model beside it.

    ``accuracy`` with its ``standard_error``; ``chance`` (one in four) and ``overlap``: choosing the
    answer whose letters, three at a time, occur most in the question. ``cut``: items whose question
    had to lose its beginning to fit into the context.
    """
    items: list[Item] = made["items"]
    per_byte, cut = _likelihoods(model, items)
    right = np.array([item.answer == int(np.argmax(p)) for item, p in zip(items, per_byte)])  # noqa: B905
    trivial = np.array([overlap(item) for item in items])
    skills = np.array([item.skill for item in items])

    def figures(chosen: np.ndarray) -> dict[str, Any]:
        n = int(chosen.sum())
        share = float(right[chosen].mean()) if n else math.nan
        return {
            "items": n,
            "accuracy": share,
            "standard_error": math.sqrt(share * (1 - share) / n) if n else math.nan,
            "chance": 1 / CHOICES,
            "overlap": float(trivial[chosen].mean()) if n else math.nan,
        }

    return {
        **figures(np.ones(len(items), dtype=bool)),
        "cut": cut,
        "skills": {
            skill: {**made["skills"][skill], **figures(skills == skill)} for skill in SKILLS
        },
    }


def overlap(item: Item) -> float:
    """The share of a point that goes to the answer most like the question; ties share it."""
    question = item.prompt.lower()
    likeness = []
    for choice in item.choices:
        word = choice.strip().lower()
        parts = {word[i : i + 3] for i in range(max(len(word) - 2, 1))}
        likeness.append(sum(part in question for part in parts) / len(parts))
    best = [i for i, value in enumerate(likeness) if value == max(likeness)]
    return (item.answer in best) / len(best)


def _likelihoods(model: Model, items: list[Item]) -> tuple[list[np.ndarray], int]:
    """Log-likelihood per byte of every choice, [CHOICES] for each item; and how many were cut."""
    context = model.config.max_position_embeddings
    eot = model.tokenizer.eot_id
    rows: list[tuple[list[int], int]] = []  # ids, and how many at the end are the answer
    cut = 0
    for item in items:
        start = model.tokenizer.encode(item.prompt)
        answers = []
        for choice in item.choices:
            ids = model.tokenizer.encode(item.prompt + choice)
            shared = next((i for i, (a, b) in enumerate(zip(start, ids)) if a != b), len(start))  # noqa: B905
            answers.append(([eot, *ids], len(ids) - shared))
        cut += any(len(ids) > context + 1 for ids, _ in answers)
        rows += [(ids[-context - 1 :], min(size, context)) for ids, size in answers]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    found = np.zeros(len(rows))
    with progress("benchmark", len(rows), "answers") as advance:
        while order:
            longest = len(rows[order[-1]][0]) - 1
            batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
            inputs = np.full((len(batch), longest), eot)
            targets = np.full((len(batch), longest), IGNORED)
            for row, index in enumerate(batch):
                ids, size = rows[index]
                inputs[row, : len(ids) - 1] = ids[:-1]
                targets[row, len(ids) - 1 - size : len(ids) - 1] = ids[len(ids) - size :]
            nats = model.nll(torch.from_numpy(inputs), torch.from_numpy(targets))
            found[batch] = -nats.double().sum(-1).cpu().numpy()
            advance(len(batch))
    sizes = [len(choice.encode()) for item in items for choice in item.choices]
    return list((found / np.array(sizes)).reshape(-1, CHOICES)), cut
