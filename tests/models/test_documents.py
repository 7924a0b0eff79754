"""Documents in one row see nothing of one another: each is as if it stood alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests import helpers_distill, helpers_training
from tests.helpers_distill import RECURSIVE
from thimble.config.model import ModelConfig
from thimble.models import interop

NOWHERE = Path("unused")
STARTS = (0, 7, 8, 19)  # one document of a single token


def model_config(mixer: str, schedule: str) -> ModelConfig:
    words = RECURSIVE if schedule == "recursive" else []
    if mixer == "retention":
        return helpers_distill.config(NOWHERE, None, *words).model
    return helpers_training.config(NOWHERE, *words).model


@pytest.mark.parametrize("schedule", ["once", "recursive"])
@pytest.mark.parametrize("mixer", ["attention", "retention"])
def test_a_document_is_as_if_alone(mixer: str, schedule: str) -> None:
    shape = model_config(mixer, schedule)
    generator = torch.Generator().manual_seed(3)
    model = interop.new_model(shape).double()
    with torch.no_grad():
        for parameter in model.parameters():  # large, so that what is seen makes a difference
            parameter.normal_(std=0.3, generator=generator)
    model.compute_dtype = torch.float64
    length = min(32, shape.max_position_embeddings)
    ids = torch.randint(0, shape.vocab_size, (2, length), generator=generator)
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[:, list(STARTS)] = True
    starts[1, 12] = True  # other places in each row
    with torch.no_grad():
        whole = model(ids, starts_bt=starts)
        for row in (0, 1):
            begins = [*starts[row].nonzero()[:, 0].tolist(), length]
            for begin, end in itertools.pairwise(begins):
                alone = model(ids[row : row + 1, begin:end])
                torch.testing.assert_close(whole[row, begin:end], alone[0], rtol=1e-5, atol=1e-5)
        # Another document before it changes nothing, and one after it neither.
        changed = ids.clone()
        changed[:, :7] = (changed[:, :7] + 1) % shape.vocab_size
        changed[:, 19:] = (changed[:, 19:] + 1) % shape.vocab_size
        again = model(changed, starts_bt=starts)
        torch.testing.assert_close(again[:, 7:19], whole[:, 7:19], rtol=1e-9, atol=1e-9)
        # Without being told it would: the test can fail.
        assert (model(changed)[:, 8:19] - model(ids)[:, 8:19]).abs().max() > 1e-4


@pytest.mark.parametrize("mixer", ["attention", "retention"])
def test_gradients_stay_within_a_document(mixer: str) -> None:
    model = interop.new_model(model_config(mixer, "once")).initialize()
    ids = torch.arange(16)[None] + 20
    starts = torch.zeros(1, 16, dtype=torch.bool)
    starts[:, [0, 9]] = True
    for again in (False, True):
        model.zero_grad()
        model.checkpoint_activations = again
        hidden = model.hidden(ids, starts_bt=starts)
        hidden[:, 9:].square().sum().backward()
        assert model.embedding.weight.grad is not None
        touched = model.embedding.weight.grad.abs().sum(-1).nonzero()[:, 0].tolist()
        assert touched == list(range(29, 36))
