from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.helpers_evaluation import EOT, memory_split
from thimble.errors import DataError
from thimble.evaluation import perplexity
from thimble.evaluation.perplexity import evaluate_split

LOGITS = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))


def bigram_nll(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A model that looks one token back: its loss does not depend on where windows are cut."""
    losses = torch.nn.functional.cross_entropy(
        LOGITS[inputs].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view_as(targets)


def documents(count: int = 40, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(1, 16, draw.integers(1, 30)).tolist() for _ in range(count)]


def by_hand(docs: list[list[int]]) -> float:
    log_p = LOGITS.double().log_softmax(-1)
    nats, before = 0.0, EOT
    for token in (t for d in docs for t in [*d, EOT]):
        nats -= float(log_p[before, token])
        before = token
    return nats


@pytest.mark.parametrize(("length", "batch"), [(1, 1), (7, 3), (64, 4), (10_000, 8)])
def test_every_token_counts_once_whatever_the_windows(length: int, batch: int) -> None:
    docs = documents()
    split = memory_split(docs)
    found = evaluate_split(bigram_nll, split, length, batch)
    tokens = sum(len(d) + 1 for d in docs)
    assert found["tokens"] == tokens
    assert found["bytes"] == 3 * tokens
    assert found["documents"] == len(docs)
    assert found["loss"] * tokens == pytest.approx(by_hand(docs), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(by_hand(docs) / math.log(2) / (3 * tokens))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_uniform_model_has_the_perplexity_of_the_vocabulary() -> None:
    def uniform(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.full(inputs.shape, math.log(16.0))

    found = evaluate_split(uniform, memory_split(documents()), 8, 2)
    assert found["perplexity"] == pytest.approx(16, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(4 / 3, rel=1e-6)


def test_windows_have_one_shape_and_the_past_as_input() -> None:
    split = memory_split(documents())
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def record(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == (3, 9)
        seen.append((inputs.flatten().numpy(), targets.flatten().numpy()))
        # An ignored position may hold anything.
        return torch.where(targets == -100, math.nan, 1.0)

    assert evaluate_split(record, split, 9, 3)["loss"] == 1.0
    targets = np.concatenate([t for _, t in seen])
    inputs = np.concatenate([i for i, _ in seen])
    tokens = split.tokens.astype(np.int64)
    assert targets[targets != -100].tolist() == tokens.tolist()
    assert inputs[: len(tokens)].tolist() == [EOT, *tokens[:-1].tolist()]


def test_categories_add_up_and_are_kept_apart() -> None:
    docs = documents()
    categories = ["code" if i % 3 else "hardware" for i in range(len(docs))]
    split = memory_split(docs, categories=categories, sizes=list(range(5, 45)))

    def by_token(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return targets.float().clamp(min=0)

    found = evaluate_split(by_token, split, 11, 2)
    for name in ("code", "hardware"):
        mine = [i for i, category in enumerate(categories) if category == name]
        part = found["by_category"][name]
        assert part["tokens"] == sum(len(docs[i]) + 1 for i in mine)
        assert part["bytes"] == sum(range(5, 45)[i] for i in mine)
        assert part["documents"] == len(mine)
        assert part["loss"] * part["tokens"] == pytest.approx(sum(sum(docs[i]) for i in mine))
    assert sum(p["bytes"] for p in found["by_category"].values()) == found["bytes"]


@pytest.mark.parametrize("limit", [1, 50, 200, 10**9])
def test_a_limit_takes_whole_documents_from_everywhere(limit: int) -> None:
    docs = documents(200)
    split = memory_split(docs, sizes=[100_000 + i for i in range(200)])
    found = evaluate_split(bigram_nll, split, 16, 4, max_tokens=limit)
    again = evaluate_split(bigram_nll, split, 16, 4, max_tokens=limit)
    assert found == again
    assert found["tokens"] <= limit or found["documents"] == 1
    assert found["bytes"] // 100_000 == found["documents"]
    if limit == 200:  # not the beginning of the stream
        beginning = sum(100_000 + i for i in range(found["documents"]))
        assert found["bytes"] > beginning + 50


def test_nothing_depends_on_how_often_losses_come_to_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = memory_split(documents(), categories=["a", "b"] * 20)
    whole = evaluate_split(bigram_nll, split, 8, 2)
    monkeypatch.setattr(perplexity, "HELD_NUMBERS", 20)
    assert evaluate_split(bigram_nll, split, 8, 2) == whole


def test_nan_is_reported_and_a_huge_loss_is_infinite() -> None:
    split = memory_split(documents())
    nan = evaluate_split(lambda i, t: torch.full(i.shape, math.nan), split, 8, 2)
    assert math.isnan(nan["loss"])
    assert math.isnan(nan["perplexity"])
    huge = evaluate_split(lambda i, t: torch.full(i.shape, 1e6), split, 8, 2)
    assert huge["perplexity"] == math.inf


def test_an_empty_split_or_a_wrong_table_is_refused() -> None:
    with pytest.raises(DataError, match="no documents"):
        evaluate_split(bigram_nll, memory_split([]), 8, 2)
    split = memory_split(documents())
    split.tokens = split.tokens[:-1]
    with pytest.raises(DataError, match="Build the tokens again"):
        evaluate_split(bigram_nll, split, 8, 2)
