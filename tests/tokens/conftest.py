from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.helpers_tokens import document
from thimble.console import log
from thimble.tokens import packing
from thimble.tokens.tokenizer import Tokenizer, load_tokenizer, train


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(3)
    return [document(rng, rng.randint(1, 6)) for _ in range(120)]


@pytest.fixture(scope="module")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train(texts, 400).save(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks, row groups and shards of a few documents."""
    monkeypatch.setattr(packing, "TASK_DOCUMENTS", 7)
    monkeypatch.setattr(packing, "GROUP_TOKENS", 200)
    monkeypatch.setattr(packing, "SHARD_TOKENS", 1500)
    monkeypatch.setattr(log, "propagate", True)
