"""The figures of recursive models against a computation row by row with all logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import helpers_recursive as small
from thimble.conversations.batches import gather
from thimble.errors import ConfigError, DataError
from thimble.evaluation import row_scores
from thimble.evaluation.recursive import choose, evaluate_conversations, evaluate_puzzles
from thimble.evaluation.row_scores import KEPT
from thimble.models.recursive import RecursiveLM
from thimble.objectives import linear_cross_entropy
from thimble.puzzles.loader import Split

Row = tuple[torch.Tensor, torch.Tensor, int, int]  # inputs, labels, position, puzzle


def conversation_rows(numbers: np.ndarray) -> Iterator[Row]:
    data = small.conversations()
    for number in numbers:
        made = gather(data, np.array([number]))
        prompt = int(data.examples[number]["prompt"])
        yield torch.from_numpy(made.inputs), torch.from_numpy(made.labels)[0], prompt - 1, 0


def puzzle_rows(split: Split) -> Iterator[Row]:
    for number in range(len(split)):
        made = split.rows(np.array([number]))
        inputs, labels = torch.from_numpy(made.inputs), torch.from_numpy(made.labels)[0]
        yield inputs, labels, split.metadata.seq_len - 1, int(made.puzzle_identifiers[0])


def naive(network: RecursiveLM, rows: Iterator[Row], form: str) -> dict[str, Any]:
    """Everything again, one row at a time, with all logits in float64."""
    steps = network.config.halt_max_steps
    nats, exact, right, halts, counts = [], [], [], [], []
    for inputs, labels, position, puzzle in rows:
        where = labels != -100
        if not where.any():
            continue
        losses, hits, logits = [], [], []
        puzzles = torch.tensor([puzzle]) if network.prefix else None
        for z in network.unroll(inputs, puzzles_b=puzzles):
            scores = network.head(network.tokens(z))[0, where].double()
            if form == "softmax":
                p = scores.softmax(-1)
            else:
                s = torch.where(scores >= 0, scores + 1, 1 / (1 - scores.clamp(max=0)))
                p = s / s.sum(-1, keepdim=True)
            target = labels[where]
            losses.append(-p[torch.arange(len(target)), target].log())
            hits.append(p.argmax(-1) == target)
            at = torch.tensor([position]) if network.config.causal else None
            logits.append(float(network.q_values(z, at)[0, 0].detach()))
        nats.append([float(loss.sum().detach()) for loss in losses])
        right.append([int(hit.sum()) for hit in hits])
        exact.append([bool(hit.all()) for hit in hits])
        halts.append(logits)
        counts.append(int(where.sum()))
    n, e, r, q, c = map(np.array, (nats, exact, right, halts, counts))
    stop = np.array([next((i for i, v in enumerate(row[:-1]) if v > 0), steps - 1) for row in q])
    each = np.arange(len(c))
    bce = [math.log1p(math.exp(-v)) if ok else math.log1p(math.exp(v)) for v, ok in
           zip(q[:, -1], e[:, -1], strict=True)]  # fmt: skip

    def read(step: np.ndarray) -> dict[str, Any]:
        return {
            "nll": n[each, step].sum() / c.sum(),
            "token_accuracy": r[each, step].sum() / c.sum(),
            "lm_loss": (n[each, step] / c).mean(),
            "accuracy": (r[each, step] / c).mean(),
            "exact_accuracy": e[each, step].mean(),
            "q_halt_accuracy": ((q[each, step] > 0) == e[each, step]).mean(),
        }

    return {
        "examples": len(c),
        "tokens": c.sum(),
        "q_halt_loss": np.mean(bce),
        **read(np.full(len(c), steps - 1)),
        "steps": steps,
        "halting_steps": (stop + 1).mean(),
        "halting_histogram": [int((stop == i).sum()) for i in range(steps)],
        "halting": "varies" if len(set(stop)) > 1 else "fixed",
        "when_halting": read(stop),
        "by_step": [{"step": i + 1, **read(np.full(len(c), i))} for i in range(steps)],
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[name], value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            assert len(found[name]) == len(value)
            for one, other in zip(found[name], value, strict=True):
                assert_same(one, other)
        else:
            assert found[name] == (value if isinstance(value, str) else pytest.approx(value, 1e-4))


@pytest.mark.parametrize("form", ["softmax", "stablemax"])
@pytest.mark.parametrize("changes", [{}, {"single_z": True}, {"halt_max_steps": 1}], ids=str)
def test_conversations_are_those_of_the_naive_way(form: str, changes: dict[str, Any]) -> None:
    data, network = small.conversations(), small.network_of(small.model_config(**changes))
    found = evaluate_conversations(network, data, "test", form=form, batch_size=5)
    assert_same(found, naive(network, conversation_rows(data.split("test")), form))
    assert found["form"] == form
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    answers = 0
    for number in data.split("test"):
        ids, labels = data.example(int(number))
        answers += len(data.tokenizer().decode(ids[labels].tolist()).encode())
    assert found["bytes"] == answers
    assert found["bits_per_byte"] == pytest.approx(
        found["nll"] * found["tokens"] / math.log(2) / answers
    )


def test_the_fixture_halts_at_different_steps() -> None:
    data, network = small.conversations(), small.network_of(small.model_config())
    found = evaluate_conversations(network, data, "test", form="softmax", batch_size=5)
    assert found["halting"] == "varies"
    assert sum(count > 0 for count in found["halting_histogram"]) > 1
    never = small.network_of(small.model_config(), halting=False)
    found = evaluate_conversations(never, data, "test", form="softmax", batch_size=5)
    assert found["halting"] == "fixed"
    assert found["halting_steps"] == found["steps"] == 3


@pytest.mark.parametrize(
    "changes",
    [{}, {"causal": True}, {"puzzle_identifiers": 1, "puzzle_emb_len": 2}, {"mixer": "mlp"}],
    ids=str,
)
def test_puzzles_are_those_of_the_naive_way(changes: dict[str, Any]) -> None:
    split = Split(small.puzzles(), "test")
    network = small.network_of(small.puzzle_config(split, **changes))
    found = evaluate_puzzles(network, split, form="stablemax", batch_size=4)
    assert_same(found, naive(network, puzzle_rows(split), "stablemax"))
    assert found["puzzles"] == 13
    assert 0 <= found["puzzle_accuracy"] <= found["exact_accuracy"]


def test_neither_batches_nor_chunks_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    data, network = small.conversations(), small.network_of(small.model_config())
    whole = evaluate_conversations(network, data, "test", form="softmax", batch_size=100)
    monkeypatch.setattr(row_scores, "chunk_rows", lambda device, vocab: 3)
    seen: list[float] = []
    parts = evaluate_conversations(
        network, data, "test", form="softmax", batch_size=7, advance=seen.append
    )
    assert_same(parts, whole)
    assert sum(seen) == whole["examples"]


def test_only_labelled_positions_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    data, network = small.conversations(), small.network_of(small.model_config())
    asked, largest = 0, 0
    real = row_scores.score

    def counted(hidden: torch.Tensor, *rest: Any) -> Any:
        nonlocal asked
        asked += len(hidden)
        return real(hidden, *rest)

    def watched(logits: torch.Tensor, *rest: Any) -> Any:
        nonlocal largest
        largest = max(largest, len(logits))
        return linear_cross_entropy.softmax_form(logits, *rest)

    monkeypatch.setattr(row_scores, "score", counted)
    monkeypatch.setattr(row_scores, "chunk_rows", lambda device, vocab: 16)
    monkeypatch.setitem(row_scores.FORMS, "softmax", watched)
    found = evaluate_conversations(network, data, "test", form="softmax", batch_size=8)
    assert asked == found["tokens"] * found["steps"]
    assert largest == 16


def test_no_gradients_and_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    data, network = small.conversations(), small.network_of(small.model_config())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    random = torch.get_rng_state()
    evaluate_conversations(network, data, "test", form="softmax", batch_size=8)
    assert network.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_rows_without_labels_count_nowhere() -> None:
    split = Split(small.puzzles(), "test")
    network = small.network_of(small.puzzle_config(split))
    labels = np.array(split.labels)
    labels[::3] = 0  # what the data says is not to be answered
    labels[1, :4] = 0
    split.labels = labels
    found = evaluate_puzzles(network, split, form="stablemax", batch_size=4)
    assert found["examples"] == len(split) - len(labels[::3])
    assert_same(found, naive(network, puzzle_rows(split), "stablemax"))
    split.labels = np.zeros_like(labels)
    with pytest.raises(DataError, match="has a label"):
        evaluate_puzzles(network, split, form="stablemax", batch_size=4)


def test_a_model_that_is_not_a_number_is_never_right() -> None:
    split = Split(small.puzzles(), "test")
    network = small.network_of(small.puzzle_config(split))
    with torch.no_grad():
        network.head.weight.fill_(math.nan)
    found = evaluate_puzzles(network, split, form="softmax", batch_size=4)
    assert math.isnan(found["nll"])
    assert found["accuracy"] == found["exact_accuracy"] == 0
    with torch.no_grad():
        network.head.weight.fill_(0)  # tells nothing apart
    found = evaluate_puzzles(network, split, form="softmax", batch_size=4)
    assert found["accuracy"] == 0
    assert found["nll"] == pytest.approx(math.log(6))


def test_a_choice_is_fixed_spread_and_grows() -> None:
    numbers = np.arange(100, 1100)
    chosen = choose(numbers, 250)
    assert len(chosen) == 250
    assert np.array_equal(chosen, choose(numbers, 250))
    assert np.all(np.diff(chosen) > 0)
    assert set(choose(numbers, 20)) < set(chosen) < set(numbers)
    quarters = np.histogram(chosen, bins=4, range=(100, 1100))[0]
    assert quarters.min() > 35
    assert choose(numbers, None) is numbers
    data, network = small.conversations(), small.network_of(small.model_config())
    found = evaluate_conversations(
        network, data, "test", form="softmax", batch_size=3, max_examples=7, keep=("examples",)
    )
    assert found["examples"] == 7
    assert found["kept"]["examples"].tolist() == choose(data.split("test"), 7).tolist()
    assert_same(found, naive(network, conversation_rows(choose(data.split("test"), 7)), "softmax"))


def test_what_is_kept_is_what_the_model_says() -> None:
    data, network = small.conversations(), small.network_of(small.model_config())
    found = evaluate_conversations(
        network, data, "test", form="softmax", batch_size=5, keep=KEPT, max_examples=11
    )
    kept = found["kept"]
    assert set(kept) == set(KEPT)
    for place, number in enumerate(kept["examples"].tolist()):
        made = gather(data, np.array([number]), width=data.seq_len)
        inputs, labels = torch.from_numpy(made.inputs), torch.from_numpy(made.labels)[0]
        length = int(made.lengths[0])
        assert kept["inputs"][place].tolist() == inputs[0].tolist()
        assert kept["labels"][place].tolist() == labels.tolist()
        logits = network(inputs[:, :length])[0]
        expected = torch.where(labels[:length] != -100, logits.argmax(-1), -100)
        assert kept["preds"][place, :length].tolist() == expected.tolist()
        assert kept["preds"][place, length:].tolist() == [-100] * (data.seq_len - length)
        assert torch.equal(kept["preds_by_step"][place, -1], kept["preds"][place])
        at = torch.tensor([int(data.examples[number]["prompt"]) - 1])
        assert kept["halting_steps"][place] == network.halting_steps(inputs, at)[0]
    right = (kept["preds"] == kept["labels"]) & (kept["labels"] != -100)
    assert int(right.sum()) == round(found["token_accuracy"] * found["tokens"])


def test_of_puzzles_every_position_is_kept() -> None:
    split = Split(small.puzzles(), "test")
    network = small.network_of(small.puzzle_config(split))
    found = evaluate_puzzles(network, split, form="softmax", batch_size=4, keep=KEPT)
    kept = found["kept"]
    assert kept["examples"].tolist() == list(range(len(split)))
    rows = split.rows(np.arange(len(split)))
    assert torch.equal(kept["preds"], network(torch.from_numpy(rows.inputs)).argmax(-1).int())
    assert kept["preds_by_step"].shape == (len(split), 3, 9)
    exact = (kept["preds_by_step"] == kept["labels"][:, None]).all(-1).float().mean(0)
    for row, value in zip(found["by_step"], exact.tolist(), strict=True):
        assert row["exact_accuracy"] == pytest.approx(value)
    assert kept["q_halt_logits"].shape == (len(split), 3)


def test_two_processes_give_what_one_gives() -> None:
    """Each fills its rows of the table; here the sum over processes is made by hand."""
    data, network = small.conversations(), small.network_of(small.model_config())
    options: dict[str, Any] = {"form": "softmax", "batch_size": 3, "keep": ("preds", "examples")}
    alone = evaluate_conversations(network, data, "test", **options)
    parts: list[list[torch.Tensor]] = [[], []]

    def collect(rank: int) -> dict[str, Any]:
        def add(value: torch.Tensor) -> torch.Tensor:
            parts[rank].append(value.clone())
            return value

        processes: Any = SimpleNamespace(rank=rank, count=2, add=add)
        return evaluate_conversations(network, data, "test", processes=processes, **options)

    def summed(rank: int) -> dict[str, Any]:
        sums = iter([one + other for one, other in zip(*parts, strict=True)])
        processes: Any = SimpleNamespace(
            rank=rank, count=2, add=lambda value: value.copy_(next(sums))
        )
        return evaluate_conversations(network, data, "test", processes=processes, **options)

    seen = [e for rank in (0, 1) for e in collect(rank)["kept"]["examples"].tolist()]
    assert sorted(seen) == data.split("test").tolist()
    for rank in (0, 1):
        assert_same(summed(rank), {k: v for k, v in alone.items() if k != "kept"})


@pytest.mark.parametrize("changes", [{"vocab_size": 20}, {"max_position_embeddings": 63}], ids=str)
def test_another_vocabulary_or_length_is_refused(changes: dict[str, Any]) -> None:
    network = small.network_of(small.model_config(**changes))
    with pytest.raises(DataError, match=r"vocabulary|dataset\.seq_len=63"):
        evaluate_conversations(network, small.conversations(), "test", form="softmax", batch_size=4)


def test_other_bad_input(tmp_path: Any) -> None:
    data, network = small.conversations(), small.network_of(small.model_config())
    options: dict[str, Any] = {"form": "softmax", "batch_size": 4}
    with pytest.raises(ConfigError, match="logits cannot be saved"):
        evaluate_conversations(network, data, "test", keep=("logits",), **options)
    empty = small.build_conversations(tmp_path, count=12, test_ratio=0.0)
    with pytest.raises(
        DataError, match=r"(?s)dataset\.subset_size.*dataset\.test_ratio.*--split train"
    ):
        evaluate_conversations(network, empty, "test", **options)
    split = Split(small.puzzles(), "test")
    known = small.network_of(small.puzzle_config(split, puzzle_identifiers=3, puzzle_emb_len=1))
    split.puzzle_identifiers = np.array([3] * len(split.puzzle_identifiers))
    with pytest.raises(DataError, match="other puzzles"):
        evaluate_puzzles(known, split, **options)
