"""What a recursive model makes of held-out examples, after each of its supervision steps.

Every row runs all ``halt_max_steps`` steps; of each step is kept, for each row, the loss of its
labels, how many it has right, and what the halting head says. All figures are made of these:

    nll             nats per labelled token, -log p under the form the model was trained with
                    ("softmax" or "stablemax": both are distributions over the whole vocabulary, so
                    perplexity = exp(nll) and bits per byte mean the same for either)
    token_accuracy  share of the labelled tokens that are likelier than every other token
    lm_loss         the same nats and the same share, but averaged over each row's tokens first and
    accuracy        then over the rows, so that a short answer weighs as much as a long one: what
                    the papers and their programs call by these names
    exact_accuracy  share of the rows that have all their labels right
    q_halt_loss     binary cross-entropy of the halting logit against "this row is right"
    q_halt_accuracy how often logit > 0 agrees with it
    steps           supervision steps that were run: halt_max_steps, always
    halting_steps   mean step at which the halting head would have stopped, had it been asked

The first ones are read after the last step, ``by_step`` holds them after each, and ``when_halting``
with each row read at the step at which its own halting head stops. A row without labels counts
nowhere, and a row's weight in training does not count here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thimble.errors import ConfigError, DataError
from thimble.evaluation.labels import answer_bytes
from thimble.evaluation.row_scores import KEPT, Advance, Run, Scores
from thimble.objectives.act import Rows
from thimble.tokens.loader import permute

if TYPE_CHECKING:
    from thimble.config.model import ModelConfig
    from thimble.conversations.dataset import Conversations
    from thimble.models.recursive import RecursiveLM
    from thimble.puzzles.loader import Split
    from thimble.training.distributed import Processes

CHOICE = 0x5EED  # of the permutation that chooses max_examples: the same ones every time


def evaluate_conversations(
    network: RecursiveLM,
    data: Conversations,
    split: str,
    *,
    form: str,
    max_examples: int | None = None,
    batch_size: int,
    advance: Advance | None = None,
    keep: Sequence[str] = (),
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Answers of a split, each token given those before it.

    ``max_examples``: so many, chosen by a hash of their place, the same every time; ``keep``: names
    of ``KEPT``; ``processes``: each evaluates its share and all return the whole, only what is kept
    is each one's own. ``advance(examples)`` is called after each batch.

    Returns the figures of the module's docstring, ``perplexity`` and ``bits_per_byte`` (of the
    answers' text as UTF-8; the token that ends an answer costs nats but has no bytes), ``tokens``,
    ``bytes``, ``examples``, ``halting_histogram`` (how many rows stop after each step),
    ``halting`` ("varies" or "fixed") and, with ``keep``, ``kept``: name -> tensor. Raises DataError
    for an empty split, another vocabulary, or examples longer than the model's context.
    """
    from thimble.conversations.batches import MULTIPLE, gather

    check_kept(keep)
    _check_fit(network.config, data)
    numbers = choose(data.split(split), max_examples)
    if not len(numbers):
        raise DataError(empty_split(data, split))
    # Of like length together, so that there is little padding; the longest first, so that what does
    # not fit into memory fails at once.
    numbers = numbers[np.argsort(-data.examples["length"][numbers].astype(np.int64), kind="stable")]

    def batch(places: np.ndarray) -> Rows:
        chosen = numbers[places]
        longest = int(data.examples["length"][chosen].max()) - 1
        # Rounded up for fewer shapes, but never beyond the context.
        made = gather(data, chosen, width=min(-(-longest // MULTIPLE) * MULTIPLE, data.seq_len))
        prompt = data.examples["prompt"][chosen].astype(np.int64)
        return Rows(
            torch.from_numpy(made.inputs),
            torch.from_numpy(made.labels),
            torch.from_numpy((prompt - 1).clip(min=0)),
            torch.zeros(len(places), dtype=torch.int64),
            torch.ones(len(places)),
        )

    run = Run(network, form, tuple(keep), data.seq_len, data.pad_id, everywhere=False)
    scores, kept = run(batch, numbers, batch_size, advance, processes)
    size = int(answer_bytes(data, numbers).sum())
    found = figures(scores, form)
    nll = found["nll"]
    # Beyond a loss of 700 the exponential leaves the range of a float.
    found["perplexity"] = math.exp(nll) if not nll > 700 else math.inf
    found["bits_per_byte"] = nll * found["tokens"] / math.log(2) / size if size else None
    found["bytes"] = size
    return {**found, "kept": kept} if keep else found


def evaluate_puzzles(
    network: RecursiveLM,
    split: Split,
    *,
    form: str,
    max_examples: int | None = None,
    batch_size: int,
    advance: Advance | None = None,
    keep: Sequence[str] = (),
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Answers to puzzles; parameters, figures and errors as of ``evaluate_conversations``.

    ``exact_accuracy`` counts examples. ``puzzles`` is their number of puzzles, and
    ``puzzle_accuracy``, also in ``by_step``, the share of those of which every evaluated example is
    right: the same where a puzzle is one example, as in Sudoku and mazes.
    """
    metadata = split.metadata
    check_kept(keep)
    config = network.config
    shape = metadata.vocab_size, metadata.seq_len
    if shape != (config.vocab_size, config.max_position_embeddings):
        raise DataError(
            f"These puzzles have {metadata.seq_len:,} positions and {metadata.vocab_size} symbols, "
            f"the model has {config.max_position_embeddings:,} and {config.vocab_size}: it was "
            "trained on other puzzles."
        )
    known = config.puzzle_identifiers
    if known and int(split.puzzle_identifiers.max(initial=0)) >= known:
        raise DataError(
            f"The model knows {known:,} puzzles by their identifiers and the data has "
            f"{metadata.num_puzzle_identifiers:,}: it was trained on other puzzles."
        )
    numbers = choose(np.arange(len(split)), max_examples)
    if not len(numbers):
        raise DataError("The split has no puzzles, so there is nothing to evaluate.")
    batch_size = min(batch_size, len(numbers))

    def batch(places: np.ndarray) -> Rows:
        # Filled up with rows that do not count: one shape, compiled once.
        chosen = np.pad(numbers[places], (0, batch_size - len(places)), constant_values=-1)
        made = split.rows(chosen)
        return Rows(
            torch.from_numpy(made.inputs),
            torch.from_numpy(made.labels),
            torch.full((len(chosen),), metadata.seq_len - 1),  # read by a causal model only
            torch.from_numpy(made.puzzle_identifiers),
            torch.ones(len(chosen)),
        )

    run = Run(network, form, tuple(keep), metadata.seq_len, metadata.pad_id, everywhere=True)
    scores, kept = run(batch, numbers, batch_size, advance, processes)
    found = figures(scores, form)
    labelled = scores.labelled > 0
    puzzle = np.searchsorted(split.puzzles, numbers[labelled], side="right")
    _, member = np.unique(puzzle, return_inverse=True)
    wrong = scores.right[labelled] < scores.labelled[labelled, None]  # [N, S]
    for step, row in enumerate(found["by_step"]):
        row["puzzle_accuracy"] = float(np.mean(np.bincount(member, wrong[:, step]) == 0))
    found["puzzles"] = int(member.max()) + 1
    found["puzzle_accuracy"] = found["by_step"][-1]["puzzle_accuracy"]
    return {**found, "kept": kept} if keep else found


# ---------------------------------------------------------------------------------- the figures


def figures(scores: Scores, form: str) -> dict[str, Any]:
    """The figures of the module's docstring. Raises DataError when no row has a label."""
    scores = scores.with_labels()
    count, steps = scores.nats.shape
    if not count:
        raise DataError("No example of the split has a label, so there is nothing to evaluate.")
    halting = scores.halting
    last = np.full(count, steps)
    exact = scores.right[:, -1] == scores.labelled
    logit = scores.q_halt[:, -1]
    return {
        "form": form,
        "examples": count,
        "tokens": int(scores.labelled.sum()),
        **at(scores, last),
        "q_halt_loss": float(np.mean(np.logaddexp(0, logit) - logit * exact)),
        "steps": steps,
        "halting_steps": float(halting.mean()),
        "halting_histogram": np.bincount(halting, minlength=steps + 1)[1:].tolist(),
        "halting": "varies" if halting.min() < halting.max() else "fixed",
        "when_halting": at(scores, halting),
        "by_step": [{"step": n, **at(scores, np.full(count, n))} for n in range(1, steps + 1)],
    }


def at(scores: Scores, step_n: np.ndarray) -> dict[str, float]:
    """Figures with row n read after ``step_n[n]`` supervision steps."""
    cell = np.arange(len(step_n)), step_n - 1
    tokens = scores.labelled.sum()
    exact = scores.right[cell] == scores.labelled
    return {
        "nll": float(scores.nats[cell].sum() / tokens),
        "token_accuracy": float(scores.right[cell].sum() / tokens),
        "lm_loss": float(np.mean(scores.nats[cell] / scores.labelled)),
        "accuracy": float(np.mean(scores.right[cell] / scores.labelled)),
        "exact_accuracy": float(exact.mean()),
        "q_halt_accuracy": float(np.mean((scores.q_halt[cell] > 0) == exact)),
    }


# -------------------------------------------------------------------------------------- the data


def choose(numbers: np.ndarray, max_examples: int | None) -> np.ndarray:
    """At most ``max_examples`` of ``numbers``, the same every time, spread evenly; in order.

    A larger choice has a smaller one in it.
    """
    if max_examples is None or len(numbers) <= max_examples:
        return numbers
    places = permute(np.arange(len(numbers)), len(numbers), CHOICE)
    return numbers[places < max_examples]


def empty_split(data: Conversations, split: str) -> str:
    """What to change when a split has no examples."""
    other = "train" if split == "test" else "test"
    share = f"dataset.{'val' if split == 'val' else 'test'}_ratio=0.2"
    return (
        f"The {split} split of {data.directory} is empty, so there is nothing to evaluate. Take "
        f"more conversations (dataset.subset_size) or hold out a larger share of them ({share}), "
        "best when training: with --overrides they can be ones it was trained on, which is said. "
        f"Or evaluate another split:\n  --split {other}"
    )


def check_kept(names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in KEPT]:
        raise ConfigError(f"{unknown[0]} cannot be saved; there are {', '.join(KEPT)}.")


def _check_fit(config: ModelConfig, data: Conversations) -> None:
    if data.vocab_size > config.vocab_size:
        raise DataError(
            f"The data has a vocabulary of {data.vocab_size:,} and the model one of "
            f"{config.vocab_size:,}: they do not belong together."
        )
    if data.seq_len > config.max_position_embeddings:
        raise DataError(
            f"Examples are up to {data.seq_len:,} tokens long and the model sees "
            f"{config.max_position_embeddings:,}. Use data with "
            f"dataset.seq_len={config.max_position_embeddings}."
        )
