"""Distillation from sparse targets: equal to the dense, naive form, nothing at the teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from thimble.errors import ConfigError
from thimble.objectives import sparse_kl, sparse_targets
from thimble.objectives.linear_cross_entropy import linear_cross_entropy
from thimble.objectives.sparse_kl import linear_sparse_kl
from thimble.objectives.sparse_targets import SampledTargets, SparseTargets, drawn, likeliest
from thimble.training.memory import Allocations

VOCABULARY = 131
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head and labels of a student; hidden states and head of a teacher."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 67, 24, generator=draw, dtype=dtype, requires_grad=True)
    weight = (torch.randn(VOCABULARY, 24, generator=draw, dtype=dtype) * 0.5).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (3, 67), generator=draw)
    labels[0, :50] = -100
    labels[2, 66] = -100
    theirs = torch.randn(3, 67, 40, generator=draw, dtype=dtype)
    head = torch.randn(VOCABULARY, 40, generator=draw, dtype=dtype) * 0.4
    return hidden, weight, labels, theirs, head


def naive(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    indices: Tensor,
    *,
    alpha: float,
    temperature: float,
    reverse: bool,
) -> Tensor:
    """The loss as one writes it with all logits of both at hand; the rest is added up."""
    in_bucket = F.one_hot(indices, VOCABULARY).sum(-2).bool()

    def buckets(z: Tensor) -> Tensor:
        p = (z / temperature).softmax(-1)
        rest = p.masked_fill(in_bucket, 0).sum(-1, keepdim=True)
        return torch.cat([p.gather(-1, indices), rest], dim=-1)

    p, q = buckets(teacher_logits), buckets(logits)
    if reverse:
        p, q = q, p
    divergence = torch.where(p > 0, p * (p / q.clamp(min=1e-30)).log(), 0).sum(-1)
    known = labels != -100
    cross_entropy = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=-100
    )
    return alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence[known].sum()


def assert_close(mine: Any, theirs: Any, tolerance: float) -> None:
    for one, other in zip(mine, theirs, strict=True):
        scale = other.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(one / scale, other / scale, atol=tolerance, rtol=tolerance)


# --- targets


@pytest.mark.parametrize("k", [1, 10, VOCABULARY])
def test_targets_are_exact_at_every_temperature(k: int) -> None:
    _, _, _, theirs, head = problem()
    logits = theirs @ head.t()
    targets = likeliest(theirs, head, k, TEMPERATURES)
    for temperature in TEMPERATURES:
        p = (logits / temperature).softmax(-1)
        best = p.topk(k)
        log_probs, log_tail = targets.at(temperature)
        torch.testing.assert_close(log_probs.exp(), best.values, atol=1e-12, rtol=1e-10)
        rest = p.sort(descending=True).values[..., k:].sum(-1)
        torch.testing.assert_close(log_tail.exp(), rest, atol=1e-12, rtol=1e-10)


def test_the_tail_keeps_its_digits_where_there_is_little_of_it() -> None:
    head = torch.eye(5)
    logits = torch.tensor([[20.0, 3.0, 1.0, 0.0, -2.0]])
    targets = likeliest(logits, head, 2)
    exact = logits.double().softmax(-1)[:, 2:].sum(-1).log()
    torch.testing.assert_close(targets.at(1.0)[1].double(), exact, atol=1e-5, rtol=0)
    assert exact.exp() < 1e-8  # of which 1 - sum in float32 would leave nothing


def test_targets_in_half_precision_still_add_up_to_one() -> None:
    _, _, _, theirs, head = problem()
    exact = likeliest(theirs, head, 20, TEMPERATURES)
    kept = replace(exact, log_probs=exact.log_probs.half(), log_tail=exact.log_tail.half())
    for temperature in TEMPERATURES:
        log_probs, log_tail = kept.at(temperature)
        assert log_probs.dtype is torch.float32
        total = log_probs.exp().sum(-1) + log_tail.exp()
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            log_probs.exp().double(), exact.at(temperature)[0].exp(), atol=1e-3, rtol=1e-2
        )


@pytest.mark.parametrize("rows", [1, 50, 1000])
def test_targets_do_not_depend_on_the_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, theirs, head = problem()
    expected = likeliest(theirs, head, 5, TEMPERATURES)
    monkeypatch.setattr(sparse_targets, "chunk_rows", lambda device, vocab_size: rows)
    made = likeliest(theirs, head, 5, TEMPERATURES)
    assert torch.equal(made.indices, expected.indices)
    assert made.indices.shape == (3, 67, 5)
    torch.testing.assert_close(made.log_probs, expected.log_probs)
    torch.testing.assert_close(made.log_tail, expected.log_tail)


def test_draws_follow_the_teacher() -> None:
    head = torch.eye(4)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for temperature in (1.0, 3.0):
        draw = torch.Generator().manual_seed(1)
        targets = drawn(logits, head, 20_000, temperature, draw)
        p = (logits[0] / temperature).softmax(-1)
        share = torch.zeros(4).index_add(0, targets.indices[0], targets.weights[0])
        torch.testing.assert_close(share, p, atol=0.015, rtol=0)
        torch.testing.assert_close(targets.log_probs[0], p.log()[targets.indices[0]])


# --- the loss


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_naive_form(
    dtype: torch.dtype, tolerance: float, alpha: float, temperature: float, reverse: bool
) -> None:
    hidden, weight, labels, theirs, head = problem(dtype)
    options: dict[str, Any] = {"alpha": alpha, "temperature": temperature, "reverse": reverse}
    for k in (1, 12, VOCABULARY):
        targets = likeliest(theirs, head, k, TEMPERATURES)
        expected = naive(hidden @ weight.t(), labels, theirs @ head.t(), targets.indices, **options)
        made = linear_sparse_kl(hidden, weight, labels, targets, **options).loss
        assert_close([made], [expected], tolerance)
        assert_close(
            torch.autograd.grad(made / 7, [hidden, weight]),
            torch.autograd.grad(expected / 7, [hidden, weight]),
            tolerance,
        )


@pytest.mark.parametrize(("rows", "few"), [(1, 1), (64, 64), (64, 5), (1000, 7), (1000, 1000)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_chunks_change_nothing(
    rows: int, few: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, labels, theirs, head = problem()
    targets = likeliest(theirs, head, 12, (temperature,))
    options: dict[str, Any] = {"alpha": 0.3, "temperature": temperature}
    expected = linear_sparse_kl(hidden, weight, labels, targets, **options)
    monkeypatch.setattr(sparse_kl, "rows_at_once", lambda device, vocab_size: rows)
    monkeypatch.setattr(sparse_kl, "rows_of_losses", lambda device, vocab_size, rows: few)
    made = linear_sparse_kl(hidden, weight, labels, targets, **options)
    assert_close(made, expected, 1e-12)
    assert_close(
        torch.autograd.grad(made.loss, [hidden, weight]),
        torch.autograd.grad(expected.loss, [hidden, weight]),
        1e-12,
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 12, 130])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_a_student_that_equals_its_teacher_has_neither_loss_nor_gradient(
    dtype: torch.dtype, tolerance: float, k: int, temperature: float, reverse: bool
) -> None:
    _, _, labels, theirs, head = problem(dtype)
    hidden, weight = theirs.clone().requires_grad_(), head.clone().requires_grad_()
    targets = likeliest(theirs, head, k, TEMPERATURES)
    made = linear_sparse_kl(
        hidden, weight, labels, targets, alpha=0.0, temperature=temperature, reverse=reverse
    )
    count = int((labels != -100).sum())
    assert abs(made.divergence.item()) < tolerance * count
    for slope in torch.autograd.grad(made.loss, [hidden, weight]):
        assert slope.abs().max() < tolerance * 20
    # and any other has some of both
    other = linear_sparse_kl(
        hidden * 1.5, weight, labels, targets, alpha=0.0, temperature=temperature, reverse=reverse
    )
    assert other.divergence > 1e-3 * count
    assert torch.autograd.grad(other.loss, weight)[0].abs().max() > 1e-3


def test_descent_at_another_temperature_ends_at_the_teacher_itself() -> None:
    """A divergence with the temperature on one side only would end at a sharper distribution."""
    teacher = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]], dtype=torch.float64)
    head = torch.eye(5, dtype=torch.float64)
    targets = likeliest(teacher, head, 4, (2.0,))
    student = torch.zeros_like(teacher, requires_grad=True)
    label = torch.zeros(1, dtype=torch.int64)
    for _ in range(500):
        loss = linear_sparse_kl(student, head, label, targets, alpha=0.0, temperature=2.0).loss
        (slope,) = torch.autograd.grad(loss, student)
        student.data -= slope
    torch.testing.assert_close(student.softmax(-1), teacher.softmax(-1), atol=1e-6, rtol=0)


def test_all_tokens_in_buckets_are_the_dense_divergence() -> None:
    hidden, weight, labels, theirs, head = problem()
    made = linear_sparse_kl(
        hidden, weight, labels, likeliest(theirs, head, VOCABULARY), alpha=0.0
    ).loss
    known = labels != -100
    dense = F.kl_div(
        (hidden @ weight.t()).log_softmax(-1)[known],
        (theirs @ head.t()).log_softmax(-1)[known],
        reduction="sum",
        log_target=True,
    )
    torch.testing.assert_close(made, dense)


def test_the_parts_are_reported_and_alpha_one_is_cross_entropy() -> None:
    hidden, weight, labels, theirs, head = problem()
    targets = likeliest(theirs, head, 12, TEMPERATURES)
    plain = linear_cross_entropy(hidden, weight, labels)
    for temperature in TEMPERATURES:
        made = linear_sparse_kl(hidden, weight, labels, targets, alpha=0.4, temperature=temperature)
        whole = 0.4 * made.cross_entropy + 0.6 * temperature**2 * made.divergence
        torch.testing.assert_close(made.loss, whole)
        torch.testing.assert_close(made.cross_entropy.float(), plain.float())
        assert not made.cross_entropy.requires_grad
        assert not made.divergence.requires_grad


def test_positions_without_a_label_never_reach_the_head() -> None:
    hidden, weight, labels, theirs, head = problem()
    targets = likeliest(theirs, head, 12)
    ignored = labels == -100
    expected = linear_sparse_kl(hidden, weight, labels, targets, alpha=0.5).loss
    poisoned = hidden.detach().masked_fill(ignored[..., None], math.nan).requires_grad_()
    bad = replace(targets, log_probs=targets.log_probs.masked_fill(ignored[..., None], math.nan))
    made = linear_sparse_kl(poisoned, weight, labels, bad, alpha=0.5).loss
    torch.testing.assert_close(made, expected)
    slope, of_head = torch.autograd.grad(made, [poisoned, weight])
    assert not slope[ignored].any()
    assert slope[~ignored].abs().sum(-1).all()
    assert of_head.isfinite().all()


def test_nothing_to_learn_is_zero_not_nan() -> None:
    hidden, weight, labels, theirs, head = problem(torch.float32)
    targets = likeliest(theirs, head, 12)
    made = linear_sparse_kl(hidden, weight, torch.full_like(labels, -100), targets, alpha=0.5)
    assert [part.item() for part in made] == [0, 0, 0]
    for slope in torch.autograd.grad(made.loss, [hidden, weight]):
        assert torch.count_nonzero(slope) == 0


def test_all_logits_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_targets, "chunk_rows", lambda device, vocab_size: 16)
    monkeypatch.setattr(sparse_kl, "rows_at_once", lambda device, vocab_size: 16)
    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(2000, 8, requires_grad=True)
    labels = torch.randint(0, 2000, (512,))
    with Allocations() as count:
        targets = likeliest(hidden.detach(), weight.detach(), 5, (1.0, 2.0))
        linear_sparse_kl(
            hidden, weight, labels, targets, alpha=0.5, temperature=2.0
        ).loss.backward()
    logits = 4 * 512 * 2000
    assert count.peak < logits / 3
    with Allocations() as count:
        F.log_softmax(hidden @ weight.t(), dim=-1)
    assert count.peak >= 2 * logits


@pytest.mark.parametrize("reverse", [False, True])
def test_a_student_surer_than_float32_can_say_has_finite_gradients(reverse: bool) -> None:
    head = torch.eye(6)
    teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
    targets = likeliest(teacher, head, 2)
    for sharp in (90.0, 1e4):
        student = torch.tensor([[sharp, 0, 0, 0, 0, 0]]).requires_grad_()
        made = linear_sparse_kl(
            student, head, torch.tensor([1]), targets, alpha=0.2, reverse=reverse
        )
        (slope,) = torch.autograd.grad(made.loss, student)
        assert made.loss.isfinite()
        assert slope.isfinite().all()
        assert slope[0, 0] > 0.1


def test_half_precision_stays_near() -> None:
    hidden, weight, labels, theirs, head = problem(torch.float32)
    targets = likeliest(theirs, head, 12, (2.0,))
    options: dict[str, Any] = {"alpha": 0.3, "temperature": 2.0}
    exact = linear_sparse_kl(hidden, weight, labels, targets, **options)
    near = linear_sparse_kl(hidden.bfloat16(), weight, labels, targets, **options)
    assert near.loss.dtype is torch.float32
    assert near.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
    slopes = [torch.autograd.grad(made.loss, weight)[0] for made in (near, exact)]
    assert slopes[0].dtype is torch.float32
    assert (slopes[0] - slopes[1]).norm() < 0.02 * slopes[1].norm()


# --- draws


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_draws_are_unbiased(temperature: float, alpha: float) -> None:
    """The mean over all draws there are, each as often as it happens, is the dense loss."""
    hidden, weight, labels, theirs, head = problem()
    p = (theirs @ head.t() / temperature).softmax(-1)
    everything = torch.arange(VOCABULARY).expand(*labels.shape, VOCABULARY)
    targets = SampledTargets(everything, p, p.log(), temperature)
    options: dict[str, Any] = {"alpha": alpha, "temperature": temperature}
    made = linear_sparse_kl(hidden, weight, labels, targets, **options).loss
    dense = linear_sparse_kl(
        hidden, weight, labels, likeliest(theirs, head, VOCABULARY, (temperature,)), **options
    ).loss
    torch.testing.assert_close(made, dense)
    assert_close(
        torch.autograd.grad(made, [hidden, weight]),
        torch.autograd.grad(dense, [hidden, weight]),
        1e-10,
    )


def test_draws_come_nearer_to_the_dense_gradient_and_top_k_does_not() -> None:
    hidden, weight, labels, theirs, head = problem()
    flat = theirs * 0.2  # much of the probability is in the tail, in a shape of its own

    def slope(targets: SparseTargets | SampledTargets) -> Tensor:
        made = linear_sparse_kl(hidden, weight, labels, targets, alpha=0.0).loss
        return torch.autograd.grad(made, weight)[0]

    exact = slope(likeliest(flat, head, VOCABULARY))
    draw = torch.Generator().manual_seed(2)
    many = torch.stack([slope(drawn(flat, head, 12, 1.0, draw)) for _ in range(300)]).mean(0)
    few = slope(drawn(flat, head, 12, 1.0, draw))
    errors = [((x - exact).norm() / exact.norm()).item() for x in (many, few)]
    biased = ((slope(likeliest(flat, head, 12)) - exact).norm() / exact.norm()).item()
    assert errors[0] < errors[1] / 10
    assert errors[0] < biased / 5


def test_repeated_draws_count_repeatedly() -> None:
    hidden, weight, labels, theirs, head = problem()
    log_p = (theirs @ head.t()).log_softmax(-1)
    index = torch.tensor([5, 5, 9, 5]).expand(*labels.shape, 4)
    weights = torch.full(index.shape, 0.25, dtype=torch.float64)
    repeated = SampledTargets(index, weights, log_p.gather(-1, index), 1.0)
    index = torch.tensor([5, 9]).expand(*labels.shape, 2)
    weights = torch.tensor([0.75, 0.25], dtype=torch.float64).expand(*labels.shape, 2)
    counted = SampledTargets(index, weights, log_p.gather(-1, index), 1.0)
    made = [linear_sparse_kl(hidden, weight, labels, t, alpha=0.1) for t in (repeated, counted)]
    assert_close(made[0], made[1], 1e-12)
    assert_close(
        torch.autograd.grad(made[0].loss, [hidden, weight]),
        torch.autograd.grad(made[1].loss, [hidden, weight]),
        1e-12,
    )


# --- what is refused


def test_what_cannot_be_is_refused() -> None:
    hidden, weight, labels, theirs, head = problem()
    targets = likeliest(theirs, head, 3, (1.0, 2.0))
    with pytest.raises(ConfigError, match=r"1, 2, not at 1\.5"):
        linear_sparse_kl(hidden, weight, labels, targets, alpha=0.5, temperature=1.5)
    samples = drawn(theirs, head, 3, 2.0)
    with pytest.raises(ConfigError, match="temperature 2, the loss is at 1"):
        linear_sparse_kl(hidden, weight, labels, samples, alpha=0.5)
    with pytest.raises(ConfigError, match="reverse"):
        linear_sparse_kl(hidden, weight, labels, samples, alpha=0.5, temperature=2.0, reverse=True)
    for k in (0, VOCABULARY + 1):
        with pytest.raises(ConfigError, match="from 1 to 131"):
            likeliest(theirs, head, k)
    with pytest.raises(ConfigError, match="at least 1"):
        drawn(theirs, head, 0)
