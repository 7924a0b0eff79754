"""Recursive runs of a few steps, compared with plain transformers once for all tests that look."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tests import helpers_recursion as helpers
from thimble import api
from thimble.evaluation.comparison import Comparison
from thimble.training import train

SHORT = ("training.max_steps=6", "training.log_every=2", "training.eval_every=3")


def home() -> Path:
    return Path(tempfile.mkdtemp(prefix="thimble-test-"))


@functools.cache
def conversations() -> Comparison:
    run = train(helpers.instruct(home(), *SHORT))
    return api.compare(run=run.path)


@functools.cache
def puzzles() -> Comparison:
    run = train(helpers.puzzle(home(), *SHORT))
    return api.compare(run=run.path)
