"""One finished run of a very small model, and a fresh copy of it for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import helpers_training
from tests.helpers_evaluation import change_config, finished_run


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A copy of the tokens that ``run`` was trained on, its baselines not measured yet."""
    source = helpers_training.token_directory()
    ignored = shutil.ignore_patterns("baselines-*")
    return Path(shutil.copytree(source, tmp_path / "tokens", ignore=ignored))


@pytest.fixture
def run(tokens: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(finished_run(), tmp_path / "runs" / "slm_nano" / "one"))
    change_config(copy, data={"path": str(tokens)})
    return copy
